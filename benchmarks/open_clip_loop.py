"""CPU seconds per training step: ``Trainer.fit`` against open_clip's own loop, with equal weights, batches, optimizer.

The peer is ``open_clip_train.train.train_one_epoch`` of the installed wheel on ``open_clip.CLIP`` with
``open_clip.ClipLoss``; ours is the stage of ``core/finetune`` with ``ClipLoss``. Batches lie ready in memory for both.
Fused AdamW with the same groups, gradient clipping at 1, a constant rate and a log line every ten steps are set on both
sides; a third case is open_clip with AdamW as its ``main.py`` makes it, which is not fused. Blocks of all cases take
turns in one process on one thread, from the same weights; the losses of the first steps must agree, else the program
ends. Each precision has a process of its own, whose allocator keeps what it has (page faults fall on either side by
chance). A case counts with the fastest of its blocks' median steps, since other work only ever adds. Bound: 1.03.

What differs in the loops' work: ours normalises pixels in the step (open_clip's come normalised from its transform),
sees that every loss is finite before the optimizer moves, keeps the random state from before the step so that a step
can be repeated, calls hooks, computes logits and loss in fp32 under autocast, and writes its log line to a file.
open_clip's keeps meters of time and formats nothing where its logger is off.

    python benchmarks/open_clip_loop.py [--model small|ViT-B-32] [--precision fp32 bf16] [--blocks 8] [--steps 12]
        [--json | --markdown]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from table import table

if TYPE_CHECKING:
    from torch import Tensor

    from clipgraft.config.schema import TrainConfig
    from clipgraft.encoders.base import Encoder
    from clipgraft.finetune import FinetuneStage
    from clipgraft.types import Batch

BOUND = 1.03
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
"""How far losses of the first steps may lie apart; open_clip computes logits in bf16 under autocast, we in fp32."""
CASES = {
    "open_clip": "train_one_epoch, fused AdamW",
    "open_clip, its AdamW": "train_one_epoch, AdamW as its main.py makes it",
    "clipgraft": "Trainer.fit",
}
AGREEING = 3
"""Steps whose losses are compared."""


@dataclass
class Steps:
    """Of a few steps: CPU time at the start of each [s], losses, gradients of the last before clipping."""

    ticks: list[float] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    grads: dict[str, Tensor] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Of CPU per step; the first two, which fill buffers, don't count."""
        return statistics.median(b - a for a, b in pairwise(self.ticks[2:]))


def opened(name: str) -> Encoder:
    """Random weights: ``small`` (64 px, 4 blocks of 192) or an architecture of open_clip's."""
    import torch

    from clipgraft.encoders import load
    from clipgraft.testing.tiny import tiny_clip

    torch.manual_seed(0)
    return tiny_clip(image_size=64, patch=8, width=192, depth=4) if name == "small" else load(f"open_clip:{name}")


def twin(encoder: Encoder) -> Any:
    """open_clip's own model with the encoder's weights."""
    import open_clip

    from clipgraft.encoders.openclip import open_clip_state

    model = open_clip.CLIP(**encoder.data.model_config, output_dict=True)
    model.load_state_dict(open_clip_state(encoder))
    return model


def noise(encoder: Encoder, *, batches: int, size: int) -> list[Batch]:
    """Random pixels and token ids, ready in memory; the last id of every caption is its end."""
    import torch

    from clipgraft.types import Batch

    g, config = torch.Generator().manual_seed(0), encoder.data.model_config["text_cfg"]
    shape, length, vocab = (size, 3, *encoder.preprocess.size), config["context_length"], config["vocab_size"]
    text = torch.randint(1, vocab - 1, (batches, size, length), generator=g)
    text[..., -1] = vocab - 1
    names = [str(k) for k in range(size)]
    return [Batch(torch.rand(shape, generator=g), names, text=text[k]) for k in range(batches)]


class Ready:
    """A loader of our trainer whose batches lie in memory."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        from clipgraft.data.loader import BadSamples

        self.batches, self.bad = batches, BadSamples(0)

    def iterate(self, start: int = 0) -> Iterator[Batch]:
        """Round and round."""
        for number in count(start):
            yield self.batches[number % len(self.batches)]

    def state_dict(self) -> dict[str, Any]:
        """Nothing to resume."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to resume."""


def stage_of(encoder: Encoder, config: TrainConfig) -> FinetuneStage:
    """The stage of ``core/finetune`` with the contrastive loss."""
    from clipgraft.finetune import FinetuneStage
    from clipgraft.losses.contrastive import ClipLoss

    source: Any = None  # the loader has its batches
    stage = FinetuneStage("train", train=config, source=source, encoder=encoder, losses=[ClipLoss()], weights=(1.0,))
    stage.train()
    return stage


def ours(stage: FinetuneStage, batches: Sequence[Batch], folder: Path, *, precision: str, grads: bool = False) -> Steps:
    """``Trainer.fit``."""
    from clipgraft.config.schema import DataConfig, ModelConfig, RunConfig
    from clipgraft.log import RunLog
    from clipgraft.registry import Registry
    from clipgraft.runner import Run
    from clipgraft.spec import runhook
    from clipgraft.trainer import Trainer

    found = Steps()

    class Watch:
        @runhook
        def before_step(self, run: Run, stage: object, step: int, batch: object) -> None:
            found.ticks.append(time.process_time())

        @runhook
        def before_optimizer(self, run: Run, stage: FinetuneStage, step: int) -> None:
            if grads:
                named = stage.encoder.named_parameters()
                found.grads = {k: p.grad.clone() for k, p in named if p.grad is not None}

        @runhook
        def after_step(self, run: Run, stage: object, step: int, output: Any) -> None:
            found.losses.append(output.loss)

    settings = RunConfig(
        model=ModelConfig(**{"from": "shared"}), data=DataConfig(**{"from": "noise"}), precision=precision
    )
    registry = Registry.discover(allow=[])
    run: Any = Run(folder, settings, registry.get("recipe", "core/finetune"), registry, RunLog())
    run.encoder, run.train_loader = stage.encoder, lambda stage: Ready(batches)
    run.hooks.register(Watch(), "watch")
    Trainer(stage.train_config).fit(run, stage)
    return found


def theirs(
    model: Any,
    batches: Sequence[Batch],
    encoder: Encoder,
    config: TrainConfig,
    *,
    precision: str,
    fused: bool = True,
    grads: bool = False,
) -> Steps:
    """One epoch of open_clip's loop over ``config.steps`` times ``config.accumulate`` of the batches."""
    import open_clip
    import torch
    from open_clip_train.scheduler import const_lr
    from open_clip_train.train import train_one_epoch

    found, accumulate = Steps(), config.accumulate
    pairs = [(encoder.preprocess.normalize(batch.pixels), batch.text) for batch in batches]

    class Loader:
        num_batches, num_samples = config.steps * accumulate, config.steps * config.batch_size

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for number in range(self.num_batches):
                if number % accumulate == 0:
                    found.ticks.append(time.process_time())
                yield pairs[number % len(pairs)]

    class Watched(open_clip.ClipLoss):
        def forward(self, *args: Any, **options: Any) -> Any:
            losses = super().forward(*args, **options)
            found.losses.append(losses["contrastive_loss"].detach())
            return losses

    flat = [p for n, p in model.named_parameters() if p.ndim < 2 or "ln" in n or "bias" in n or "logit_scale" in n]
    ids = {id(p) for p in flat}
    groups = [
        {"params": flat, "weight_decay": 0.0},
        {"params": [p for p in model.parameters() if id(p) not in ids], "weight_decay": config.weight_decay},
    ]
    options = {"fused": True} if fused else {}
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, **options)
    if grads:

        def keep(*_: Any) -> None:
            found.grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}

        optimizer.register_step_pre_hook(keep)
    args = SimpleNamespace(
        device="cpu",
        precision={"fp32": "fp32", "bf16": "amp_bf16"}[precision],
        distill=False,
        accum_freq=accumulate,
        skip_scheduler=False,
        horovod=False,
        grad_clip_norm=config.clip_norm,
        rank=0,
        local_rank=0,
        world_size=1,
        batch_size=len(batches[0]),
        log_every_n_steps=config.log_every,
        wandb=False,
    )
    data = {"train": SimpleNamespace(dataloader=Loader(), set_epoch=lambda epoch: None)}
    scheduler = const_lr(optimizer, config.lr, config.warmup, config.steps)
    train_one_epoch(model, data, Watched(), 0, optimizer, None, scheduler, None, args)
    return found


def measure(precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """All cases of one precision in this process."""
    import torch

    from clipgraft.config.schema import TrainConfig

    torch.set_num_threads(1)
    encoder = opened(options.model)
    model, batches = twin(encoder), noise(encoder, batches=4, size=options.batch_size)
    config = TrainConfig(steps=options.steps, batch_size=options.batch_size, lr=1e-5, schedule="constant")
    stage = stage_of(encoder, config)
    first = {k: v.clone() for k, v in encoder.state_dict().items()}
    start = {k: v.clone() for k, v in model.state_dict().items()}
    seconds: list[dict[str, float]] = []
    apart = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for block in range(options.blocks):
            found: dict[str, Steps] = {}
            for case in [*CASES][block % 3 :] + [*CASES][: block % 3]:
                encoder.load_state_dict(first)
                model.load_state_dict(start)
                if case == "clipgraft":
                    found[case] = ours(stage, batches, Path(folder) / str(block), precision=precision)
                else:
                    fused = case == "open_clip"
                    found[case] = theirs(model, batches, encoder, config, precision=precision, fused=fused)
            reference = torch.stack(found["open_clip"].losses[:AGREEING])
            for case, steps in found.items():
                apart = max(apart, float((torch.stack(steps.losses[:AGREEING]) - reference).abs().max()))
                if not apart <= TOLERANCE[precision]:
                    sys.exit(f"{case} and open_clip differ in a loss by {apart:.1e} at {precision}")
            seconds.append({case: steps.seconds for case, steps in found.items()})
    best = {case: min(block[case] for block in seconds) for case in CASES}
    cases = {
        case: {"cpu_ms": round(1e3 * value, 2), "ratio": round(value / best["open_clip"], 4)}
        for case, value in best.items()
    }
    return {"cases": cases, "ratio": cases["clipgraft"]["ratio"], "largest_loss_difference": apart}


KEEP = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**40)}
"""For glibc: memory once taken is kept and used again."""


def alone(script: str, *words: object, **variables: str) -> dict[str, Any]:
    """The JSON that ``script`` prints last, run with these words in a process of its own on one thread."""
    command = [sys.executable, script, *map(str, words)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))} ended with {done.returncode}: {done.stderr[-800:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print the table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", help="small, or an architecture of open_clip's")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.precision[0], options)))
        return
    sizes = ("--model", options.model, "--blocks", options.blocks, "--steps", options.steps)
    sizes += ("--batch-size", options.batch_size)
    found = {p: alone(__file__, "--one", "--precision", p, *sizes, **KEEP) for p in options.precision}
    if options.json:
        print(json.dumps({"model": options.model, "batch_size": options.batch_size, **found, "bound": BOUND}))
        return
    rows = [
        (f"{case}, {precision}", f"{row['cpu_ms']:.1f}", f"{row['ratio']:.3f}")
        for precision, part in found.items()
        for case, row in part["cases"].items()
    ]
    print(table(("loop", "CPU ms per step", "ratio"), rows, markdown=options.markdown))
    worst = {p: part["largest_loss_difference"] for p, part in found.items()}
    told = ", ".join(f"{p} {x:.0e}" for p, x in worst.items())
    print(f"\nlosses of the first {AGREEING} steps agree to {told}; bound of the ratio {BOUND}")


if __name__ == "__main__":
    main()
