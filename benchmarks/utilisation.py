"""Share of the hardware's peak that a recipe's training step uses (model FLOPs utilisation), for any recipe and model.

The recipe runs as users run it, for a few steps. Operations of one step are counted by the formulas of torch's flop
counter: matrix products, convolutions and attention, forward and backward; what is computed twice to save memory
counts twice. The time of a step is the median over the steps after it, with the device synchronised, data included.
The peak is measured in the same run, as the best of square matrix products in the run's precision; ``--peak`` takes
the data sheet's number instead [TFLOP/s].

Without ``--set data.from`` the run trains on photographs of scikit-image with captions, written to a temporary folder.

    python benchmarks/utilisation.py finetune --set model.from=open_clip:ViT-B-16 --set train.batch_size=256 \
        --set precision=bf16 --set 'losses=[core/clip]' [--steps 12] [--peak 989] [--json]
    python benchmarks/utilisation.py genhancer:tiny --set threads=1
    python benchmarks/utilisation.py diva:tiny --stage train --set threads=1
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from embed_throughput import write_photos
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from clipgraft.execution import run_recipe
from clipgraft.registry import Registry
from clipgraft.runner import Run
from clipgraft.spec import runhook
from clipgraft.stage import TrainStage
from clipgraft.trainer import Trainer
from clipgraft.types import Batch

WARM = 3
"""Steps of a stage before the one that is counted."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Counter(TorchDispatchMode):
    """Floating-point operations of what runs inside. torch's FlopCounterMode refuses steps that call autograd.grad."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, formula = func(*args, **(kwargs or {})), flop_registry.get(func._overloadpacket)
        self.total += 0 if formula is None else int(formula(*args, **(kwargs or {}), out_val=out))
        return out


class Meter:
    """Counts the operations of one step per stage and notes when the steps after it begin."""

    def __init__(self) -> None:
        self.flops: dict[str, int] = {}
        self.ticks: dict[str, list[float]] = {}
        self.samples: dict[str, int] = {}
        self._counter: Counter | None = None

    @runhook
    def before_step(self, run: Run, stage: TrainStage, step: int, batch: Batch) -> None:
        if step == WARM:
            self._counter = Counter()
            self._counter.__enter__()
        if step > WARM:
            torch.cuda.synchronize() if run.device.type == "cuda" else None
            self.ticks.setdefault(stage.name, []).append(time.perf_counter())
            self.samples[stage.name] = len(batch)

    @runhook
    def after_step(self, run: Run, stage: TrainStage, step: int) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self.flops[stage.name] = self._counter.total
            self._counter = None


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of several square products."""
    best, repeats = 0.0, 8
    for size in (1024, 2048) if device.type == "cpu" else (4096, 8192):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        for _ in range(3):
            torch.cuda.synchronize() if device.type == "cuda" else None
            start = time.perf_counter()
            for _ in range(repeats if device.type == "cuda" else 1):
                a @ b
            torch.cuda.synchronize() if device.type == "cuda" else None
            count = repeats if device.type == "cuda" else 1
            best = max(best, 2 * size**3 * count / (time.perf_counter() - start))
    return best


def metered(recipe: str, settings: list[str], folder: Path) -> tuple[Meter, torch.device, str]:
    """Run ``recipe`` with a meter; also the device and the precision that it ran in."""
    meter, fit, seen = Meter(), Trainer.fit, {}

    def watched(self: Trainer, run: Run, stage: TrainStage) -> object:
        if not seen:
            run.hooks.register(meter, "meter")
        seen.update(device=run.device, precision=run.config.precision)
        return fit(self, run, stage)

    Trainer.fit = watched  # type: ignore[method-assign, assignment]
    try:
        run_recipe(recipe, overrides=settings, out=folder / "run", registry=Registry.discover())
    finally:
        Trainer.fit = fit  # type: ignore[method-assign]
    return meter, seen["device"], str(seen["precision"])


def main() -> None:
    """Print a line per stage, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="RECIPE[:PRESET]")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument("--steps", type=int, default=12, help="per stage, the first four are not timed")
    parser.add_argument(
        "--stage",
        action="append",
        help="whose steps are set; by default train, and with a preset generator.train, clip.train",
    )
    parser.add_argument("--peak", type=float, help="of the data sheet [TFLOP/s]")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, settings = Path(name), list(options.settings)
        if ":" not in options.recipe and not any(s.startswith("data.from=") for s in settings):
            (folder / "photos").mkdir()
            write_photos(folder / "photos", options.images, (256, 256))
            rows = [f"photos/{p.name},a photograph with the number {p.stem}" for p in (folder / "photos").iterdir()]
            (folder / "pairs.csv").write_text("\n".join(["image,caption", *sorted(rows)]) + "\n", "utf-8")
            settings.append(f"data.from=csv:{folder / 'pairs.csv'}")
            settings += [] if any(s.startswith("train.lr=") for s in settings) else ["train.lr=1e-5"]
        for stage in options.stage or (("train",) if ":" not in options.recipe else ("generator.train", "clip.train")):
            settings.append(f"{stage}.steps={options.steps}")
        settings += ["evaluate.on=[]", "evaluate.retention=none"]
        meter, device, precision = metered(options.recipe, settings, folder)
    peak = options.peak * 1e12 if options.peak else measured_peak(device, DTYPES[precision])
    rows = {}
    for stage, flops in meter.flops.items():
        seconds = statistics.median(b - a for a, b in pairwise(meter.ticks[stage]))
        rows[stage] = {
            "gflops_per_step": flops / 1e9,
            "seconds_per_step": seconds,
            "samples_per_second": meter.samples[stage] / seconds,
            "utilisation": flops / seconds / peak,
        }
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    told = {"recipe": options.recipe, "device": where, "precision": precision, "peak_tflops": peak / 1e12}
    if options.json:
        print(json.dumps({**told, "peak_measured": options.peak is None, "stages": rows}))
        return
    print(", ".join(f"{key} {value}" for key, value in told.items()))
    print(f"{'stage':14}{'GFLOP per step':>16}{'ms per step':>14}{'samples/s':>12}{'of the peak':>14}")
    for stage, row in rows.items():
        print(
            f"{stage:14}{row['gflops_per_step']:16.2f}{row['seconds_per_step'] * 1e3:14.1f}"
            f"{row['samples_per_second']:12.1f}{row['utilisation']:14.1%}"
        )


if __name__ == "__main__":
    main()
