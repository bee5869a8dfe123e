"""One step of DIVA, ours against the official code's order of work, same sizes and random weights, in this run.

The official step encodes the constant prompt, encodes the crops, and in each of its two noisy passes runs the image
tower again; the first pass calls backward itself. Ours encodes the prompt once for good, runs the tower once per step,
uses each UNet graph up before the next, and may keep latents and recompute activations. Loss and every gradient must
agree. The naive step is written here from that description, over the same modules.

CPU time: blocks of steps take turns in one process on one thread; the median of the blocks' ratios is what counts.
Memory: each case in a process of its own, the peak of RssAnon above its value before the models are built, smallest
of the repeats; the weights that a case holds count, so the text encoder is part of the official step alone.

    python benchmarks/diffusion_step.py [--blocks 8] [--steps 3] [--batch-size 8] [--repeats 2] [--json]
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usage import Peak

if TYPE_CHECKING:
    from torch import Tensor

    from clipgraft.types import Batch
    from clipgraft_diffusion.diva.stage import DivaStage
    from clipgraft_diffusion.weights import Weights

CASES = {
    "official": "prompt, autoencoder and tower computed anew",
    "ours": "prompt once, tower once per step",
    "ours, latents kept": "and the autoencoder's latents from an earlier epoch or the disk",
    "ours, recomputed": "prompt once, activations of tower and UNet recomputed",
}
SIDE, PIXELS = 128, 64
"""Sides of the crops and of CLIP's images [pixels]."""


def write_parts(folder: Path) -> None:
    """A Stable Diffusion in miniature as config.json files; all its weights are drawn when it is opened."""
    width = 64
    unet = {
        "_class_name": "UNet2DConditionModel",
        "block_out_channels": [32, 64],
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 2,
        "norm_num_groups": 8,
        "cross_attention_dim": width,
        "attention_head_dim": 8,
    }
    vae = {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [8, 16, 16, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "norm_num_groups": 4,
    }
    letters = [f"{c}{end}" for end in ("", "</w>") for c in "abcdefghijklmnopqrstuvwxyz."]
    ids = {word: i for i, word in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    text = {
        "model_type": "clip_text_model",
        "vocab_size": len(ids),
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
        "bos_token_id": len(ids) - 2,
        "eos_token_id": len(ids) - 1,
        "pad_token_id": len(ids) - 1,
    }
    noise = {"_class_name": "DDPMScheduler", "prediction_type": "epsilon"}
    tokenizer = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    written = {
        "unet/config.json": unet,
        "vae/config.json": vae,
        "text_encoder/config.json": text,
        "scheduler/scheduler_config.json": noise,
        "tokenizer/vocab.json": ids,
        "tokenizer/tokenizer_config.json": tokenizer,
    }
    for name, content in written.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")


@dataclass
class Case:
    """A stage and how it makes one step on a batch; ``step`` leaves gradients and returns the logged loss."""

    stage: DivaStage
    step: Callable[[Batch], Tensor]


class Nothing:
    """No step reads from it."""

    name, fingerprint, classes, templates, attributes = "nothing", "nothing", (), (), {}

    def __len__(self) -> int:
        return 1


def open_stage(folder: Path, *, kept: bool = False, recomputed: bool = False) -> DivaStage:
    """DIVA's stage in its official order of draws and gradients, without accumulation."""
    import torch

    from clipgraft.config.schema import TrainConfig
    from clipgraft.testing.tiny import tiny_clip
    from clipgraft_diffusion.diva.stage import Critique, DivaStage
    from clipgraft_diffusion.eps import EpsObjective, NoiseSchedule
    from clipgraft_diffusion.prompt import CrossCondition
    from clipgraft_diffusion.recap import Recap
    from clipgraft_diffusion.unet import open_stable_diffusion

    sizes: dict[str, Any] = {"image_size": PIXELS, "patch": 8, "width": 192, "depth": 6, "embed": 64}
    encoder = tiny_clip(**sizes)
    critic = open_stable_diffusion(
        str(folder), prompt="a photo of a .", compat="official", checkpointing=recomputed, weights=drawn()
    )
    torch.manual_seed(0)
    condition = CrossCondition(sizes["embed"], critic.width, prompt=critic.prompt, combine="add")
    critique = Critique(Recap(kind="random", k=76), condition, EpsObjective(NoiseSchedule(), critic), compat="official")
    stage = DivaStage(
        "clip",
        train=TrainConfig(steps=1, batch_size=1, lr=1e-4),
        source=Nothing(),  # type: ignore[arg-type]
        encoder=encoder,
        base=encoder,
        critique=critique,
        remember=kept,
        checkpointing=recomputed,
    )
    encoder.image.requires_grad_(True)  # base and encoder are one here: the anchor, which needs two, is off
    stage.train()
    encoder.image.train()
    return stage


def drawn() -> dict[str, Weights]:
    """Random weights for every part."""
    from clipgraft_diffusion.weights import Weights

    return {part: Weights(seed=0) for part in ("unet", "vae", "text_encoder")}


def official(folder: Path) -> Case:
    """The step as the paper's code orders it."""
    import torch
    import transformers
    from torch.nn import functional as F

    from clipgraft.types import FeatureRequest
    from clipgraft_diffusion.crops import CROP
    from clipgraft_diffusion.opening import open_part
    from clipgraft_diffusion.unet import clip_pixels, prompt_states

    stage = open_stage(folder)
    assert stage.critique is not None
    critique, image, tokens = stage.critique, stage.encoder.image, FeatureRequest(tokens=True)
    critic: Any = critique.objective.denoiser
    schedule, project = critique.objective.schedule, critique.condition.project
    tokenizer = transformers.CLIPTokenizer.from_pretrained(str(folder / "tokenizer"))
    text = open_part(
        transformers.CLIPTextModel,
        str(folder),
        "text_encoder",
        setting="",
        otherwise="",
        weights=drawn()["text_encoder"],
    )

    def step(batch: Batch) -> Tensor:
        states = prompt_states(tokenizer, text, "a photo of a .")
        x0 = critic.latents(batch.extra[CROP].float().div(255))
        losses = []
        for k in range(2):
            t, noise = torch.randint(0, len(schedule), (len(batch),)), torch.randn(x0.shape)
            pixels = clip_pixels(stage.encoder.preprocess, batch.pixels, compat="official")
            told = project(critique.recap(image(pixels, tokens), project=stage.local)) + states
            loss = F.mse_loss(critic(schedule.mix(x0, noise, t), t, told), noise)
            losses.append(loss)
            if k == 0:
                loss.backward()
                losses = [loss.detach()]
        losses[-1].backward()
        return losses[-1].detach()

    return Case(stage, step)


def ours(folder: Path, *, kept: bool = False, recomputed: bool = False) -> Case:
    """The stage's own step."""
    stage = open_stage(folder, kept=kept, recomputed=recomputed)

    def step(batch: Batch) -> Tensor:
        loss = stage(batch).loss
        loss.backward()
        return loss.detach()

    return Case(stage, step)


def opened(name: str, folder: Path) -> Case:
    """A case of ``CASES``."""
    if name == "official":
        return official(folder)
    return ours(folder, kept="kept" in name, recomputed="recomputed" in name)


def noise_batch(size: int) -> Batch:
    """Random crops and CLIP's smaller images of them, the same in every call."""
    import torch
    from torch.nn import functional as F

    from clipgraft.types import Batch
    from clipgraft_diffusion.crops import CROP

    g = torch.Generator().manual_seed(0)
    crops = torch.randint(0, 256, (size, 3, SIDE, SIDE), dtype=torch.uint8, generator=g)
    return Batch(F.avg_pool2d(crops.float() / 255, SIDE // PIXELS), [str(i) for i in range(size)], extra={CROP: crops})


def compare(cases: dict[str, Case], batch: Batch) -> float:
    """The largest difference of any gradient from the first case's, relative to the largest entry of all.

    Ends the program when a loss or a gradient doesn't agree.
    """
    import torch

    found = {}
    for name, case in cases.items():
        case.stage.zero_grad()
        torch.manual_seed(1)
        loss = case.step(batch)
        found[name] = loss, {key: p.grad for key, p in case.stage.named_parameters() if p.grad is not None}
        case.stage.zero_grad()
    (first, (loss, grads)), worst = next(iter(found.items())), 0.0
    largest = max(float(grad.abs().max()) for grad in grads.values())
    for name, (other, own) in found.items():
        if grads.keys() != own.keys() or not torch.allclose(loss, other, rtol=1e-5):
            sys.exit(f"{name} and {first} differ: loss {float(other)} and {float(loss)}")
        worst = max(worst, *(float((own[key] - grad).abs().max()) / largest for key, grad in grads.items()))
        if worst > 1e-4:
            sys.exit(f"{name} and {first} differ in a gradient by {worst:.1e} of the largest entry")
    return worst


def seconds(case: Case, batch: Batch, steps: int) -> float:
    """CPU seconds per step."""
    start = time.process_time()
    for _ in range(steps):
        case.stage.zero_grad(set_to_none=True)
        case.step(batch)
    return (time.process_time() - start) / steps


def peak(name: str, folder: Path, size: int) -> dict[str, float]:
    """Private memory that one case needs at most, models included [MB]."""
    import torch

    torch.set_num_threads(1)
    batch, small = noise_batch(size), noise_batch(1)
    warm = opened(name, folder)
    warm.step(small)  # libraries load and take their buffers
    del warm
    gc.collect()
    with Peak() as found:
        case = opened(name, folder)
        for _ in range(3):
            case.stage.zero_grad(set_to_none=True)
            case.step(batch)
    return {"private_mb": found.value - found.start}


def main() -> None:
    """Compare, time and weigh the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(peak(options.case[0], Path(options.case[1]), options.batch_size)))
        return
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        write_parts(folder)
        batch = noise_batch(options.batch_size)
        cases = {name: opened(name, folder) for name in CASES}
        worst = compare(cases, batch)
        blocks = [
            {name: seconds(case, batch, options.steps) for name, case in cases.items()} for _ in range(options.blocks)
        ]
        memory: dict[str, list[float]] = {name: [] for name in CASES}
        for _ in range(options.repeats):
            for name in CASES:
                command = [sys.executable, __file__, "--case", name, where, "--batch-size", str(options.batch_size)]
                found = subprocess.run(command, capture_output=True, check=True).stdout.splitlines()[-1]
                memory[name].append(json.loads(found)["private_mb"])
    rows = {
        name: {
            "cpu_ms": round(1e3 * statistics.median(block[name] for block in blocks), 1),
            "time_ratio": round(statistics.median(block[name] / block["official"] for block in blocks), 3),
            "private_mb": round(min(memory[name]), 1),
            "memory_ratio": round(min(memory[name]) / min(memory["official"]), 3),
        }
        for name in CASES
    }
    if options.json:
        print(json.dumps({"batch_size": options.batch_size, "cases": rows, "worst_gradient_difference": worst}))
        return
    print(f"batch {options.batch_size}; losses agree, gradients to {worst:.0e} of the largest entry")
    print(f"{'case':22}{'CPU ms':>9}{'ratio':>8}{'private MB':>12}{'ratio':>8}")
    for name, row in rows.items():
        print(
            f"{name:22}{row['cpu_ms']:9.1f}{row['time_ratio']:8.3f}{row['private_mb']:12.1f}{row['memory_ratio']:8.3f}"
            f"  {CASES[name]}"
        )


if __name__ == "__main__":
    main()
