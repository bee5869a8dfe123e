"""LLM2CLIP's training step with text features from disk against the language model in every step, in one run.

Both cases train the same random CLIP on the same pairs, forwards and backwards, and must have the same loss: to 1e-4
with features kept in fp32, and to 1e-2 in bf16, which is what is timed; else the program ends. Cases take turns,
medians count. Memory is each case's peak (VmHWM) in a process of its own. Then the cache alone: captions per second
read at random, and bytes per caption.

    python benchmarks/llm_cache.py [--size small|medium] [--batch 64] [--steps 7] [--json]

``small``: a language model of 10 million weights beside a ViT of 1 million, ``medium``: of 76 million beside ViT-B/32.
Real language models are a hundred times that, so the ratio here is a lower bound of theirs.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipgraft.config.schema import TrainConfig
from clipgraft.data.base import Sample
from clipgraft.encoders.base import AppliedGraft, Encoder, Origin
from clipgraft.encoders.openclip import build
from clipgraft.log import RunLog
from clipgraft.testing.tiny import tiny_clip
from clipgraft.types import Batch
from clipgraft_llm.cache.build import build_cache
from clipgraft_llm.cache.reader import FeatureCache, FeatureLookup
from clipgraft_llm.llm2clip.vision_stage import VisionStage
from clipgraft_llm.testing import LLAMA_TEMPLATE, WORDS, write_tiny_llama
from clipgraft_llm.tower.graft import NAME, TransformerText
from clipgraft_llm.tower.language_model import read_language_model
from clipgraft_llm.tower.model_folder import find_model
from clipgraft_llm.tower.settings import settled

SIZES = {"small": (512, 4, 64), "medium": (1024, 8, 224)}
"""Width and layers of the language model, pixels of the images."""
SAMPLES, CAPTIONS = 192, 2
CASES = ("online", "cached")


class Pairs:
    """Random captions of about thirty words, pictures of nothing."""

    name, fingerprint, classes, templates, attributes = "pairs", "pairs", (), (), {}

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Sample:
        rng = random.Random(index)
        captions = tuple(" ".join(rng.choices(WORDS.split(), k=30)) for _ in range(CAPTIONS))
        return Sample(str(index), torch.zeros(3, 2, 2, dtype=torch.uint8), captions)


def base(size: str) -> Encoder:
    """A random CLIP."""
    torch.manual_seed(0)
    if size == "small":
        return tiny_clip(image_size=64, patch=8, width=128, depth=4)
    import open_clip

    config, usual = open_clip.get_model_config("ViT-B-32"), open_clip.transform.PreprocessCfg()
    assert config is not None
    return build(config, None, preprocess={"mean": usual.mean, "std": usual.std}, origin=Origin("random", "ViT-B-32"))


def graft_of(folder: Path) -> TransformerText:
    """How the language model is asked."""
    return TransformerText(model=str(folder), template=LLAMA_TEMPLATE, attention="bidirectional")


def stage_of(size: str, folder: Path) -> VisionStage:
    """The training stage; the language model is read when a step asks it."""
    torch.manual_seed(1)
    graft = graft_of(folder)
    encoder = graft.apply(base(size))
    encoder.data.grafts.append(AppliedGraft(NAME, graft.model_dump(mode="json"), graft, portable=False))
    train = TrainConfig(steps=1, batch_size=8, lr=1e-4)
    return VisionStage("vision", train=train, source=Pairs(), encoder=encoder).train()


def batch_of(stage: VisionStage, case: str, cache: FeatureCache, batch: int, pixels: Tensor) -> Batch:
    """The same pairs; what stands for the captions is ids or features."""
    captions = [Pairs()[k].captions[0] for k in range(batch)]
    tokenizer: Any = FeatureLookup(cache) if case == "cached" else stage.encoder.tokenizer
    return Batch(pixels, [str(k) for k in range(batch)], tokenizer(captions))


def step(stage: VisionStage, case: str, cache: FeatureCache, pixels: Tensor) -> float:
    """One step without the optimizer, tokenizing or reading included; returns the loss."""
    output = stage(batch_of(stage, case, cache, len(pixels), pixels))
    output.loss.backward()
    stage.zero_grad(set_to_none=True)
    return float(output.loss.detach())


def peak_memory() -> float:
    """MiB, of this process so far."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def alone(case: str, size: str, folder: Path, features: Path, batch: int) -> None:
    """Print the peak of one case in this process, and what it was before the first step."""
    stage, cache = stage_of(size, folder), FeatureCache(features)
    pixels = torch.rand(batch, 3, SIZES[size][2], SIZES[size][2])
    before = peak_memory()
    step(stage, case, cache, pixels)
    step(stage, case, cache, pixels)
    print(json.dumps({"before": before, "peak": peak_memory()}))


def measure(size: str, batch: int, steps: int) -> dict[str, Any]:
    """All numbers of one size."""
    width, layers, side = SIZES[size]
    with tempfile.TemporaryDirectory() as place:
        folder, features = Path(place) / "llm", Path(place) / "features"
        write_tiny_llama(folder, width=width, layers=layers, positions=512)
        found = find_model(str(folder))
        settings = settled(graft_of(folder), found)
        began, sizes = time.perf_counter(), {}
        for stored in ("fp32", "bf16"):
            out = features / stored
            built = build_cache(
                Pairs(),
                out,
                folder=found,
                settings=settings,
                read=lambda: read_language_model(found, settings),
                log=RunLog(is_main=False),
                stored=stored,
                rows=128,
            )
            sizes[stored] = built.bytes / built.captions
        building = (time.perf_counter() - began) / 2
        stage, cache = stage_of(size, folder), FeatureCache(features / "bf16")
        pixels = torch.rand(batch, 3, side, side)
        times: dict[str, list[float]] = {case: [] for case in CASES}
        losses = {}
        for k in range(steps + 1):
            for case in CASES:
                start = time.perf_counter()
                losses[case] = step(stage, case, cache, pixels)
                if k:
                    times[case].append(time.perf_counter() - start)
        losses["cached, fp32"] = step(stage, "cached", FeatureCache(features / "fp32"), pixels)
        for case, most in (("cached, fp32", 1e-4), ("cached", 1e-2)):
            if abs(losses["online"] - losses[case]) > most:
                raise SystemExit(f"the two ways differ: {losses}")
        texts = [c for k in range(SAMPLES) for c in Pairs()[k].captions]
        random.Random(0).shuffle(texts)
        lookup, start = FeatureLookup(cache), time.perf_counter()
        for at in range(0, len(texts), batch):
            lookup(texts[at : at + batch])
        reading = time.perf_counter() - start
        memory = {case: _in_process(case, size, folder, features / "bf16", batch) for case in CASES}
    medians = {case: statistics.median(values) for case, values in times.items()}
    return {
        "size": size,
        "width": width,
        "batch": batch,
        "seconds": medians,
        "ratio": medians["online"] / medians["cached"],
        "memory": memory,
        "captions_per_second_read": len(texts) / reading,
        "captions_per_second_built": len(texts) / building,
        "bytes_per_caption": sizes,
        "losses": losses,
    }


def _in_process(case: str, size: str, folder: Path, features: Path, batch: int) -> dict[str, float]:
    line = [sys.executable, __file__, "--alone", case, "--size", size, "--batch", str(batch)]
    done = subprocess.run([*line, "--places", str(folder), str(features)], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--alone", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--places", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        return alone(given.alone, given.size, Path(given.places[0]), Path(given.places[1]), given.batch)
    found = measure(given.size, given.batch, given.steps)
    if given.json:
        return print(json.dumps(found, indent=2))
    seconds, memory = found["seconds"], found["memory"]
    print(f"| {found['size']}, batch {found['batch']} | online | cached | online / cached |\n|---|--:|--:|--:|")
    print(f"| step [s] | {seconds['online']:.3f} | {seconds['cached']:.3f} | {found['ratio']:.2f} |")
    peaks = {case: m["peak"] for case, m in memory.items()}
    ratio = peaks["online"] / peaks["cached"]
    print(f"| peak memory [MiB] | {peaks['online']:.0f} | {peaks['cached']:.0f} | {ratio:.2f} |")
    own = {case: m["peak"] - m["before"] for case, m in memory.items()}
    print(f"| above what was there before the first step [MiB] | {own['online']:.0f} | {own['cached']:.0f} | |")
    print(f"\ncache: {found['captions_per_second_read']:.0f} captions/s read at random, "
          f"{found['captions_per_second_built']:.0f} built")  # fmt: skip
    for stored, each in found["bytes_per_caption"].items():
        print(f"{stored}: {each:.0f} bytes per caption of {found['width']} features")


if __name__ == "__main__":
    main()
