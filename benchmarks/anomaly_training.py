"""AnomalyCLIP's epochs with features of the frozen tower kept, against computing them in every step.

Both arms are the recipe's own stage (``cache.keep`` auto and none) on the same random tower, prompts and pictures, with
its optimizer; epochs take turns in one process. There is no augmentation, so losses must agree (to 1e-4 of their size;
pictures go through the tower in batches of another size), else the program ends. What filling the store costs is told
as well: ``whole run`` counts it, over the official 15 epochs.

    python benchmarks/anomaly_training.py [--tower base|large|small] [--images 8] [--batch-size 4] [--epochs 3] [--json]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from anomaly_inference import TOWERS, opened
from torch import Tensor

from clipgraft.config.schema import TrainConfig
from clipgraft.data.base import Sample
from clipgraft.log import RunLog
from clipgraft.types import Batch
from clipgraft_anomaly.anomalyclip.stage import PromptStage, produce
from clipgraft_anomaly.feature_store import FeatureStore, Keep
from clipgraft_anomaly.reading import Reader

ARMS: dict[str, Keep] = {"uncached": "none", "cached": "auto"}
AIM = 10.0
"""Times as many epochs per second."""
OFFICIAL_EPOCHS = 15


class Parts:
    """Noise pictures, every other one with a bright square that its mask shows."""

    name, fingerprint, classes, templates, attributes = "parts", "parts", ("normal", "anomalous"), (), {}

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        draws, side = torch.Generator().manual_seed(index), self.size
        image = torch.randint(0, 200, (3, side, side), generator=draws, dtype=torch.uint8)
        mask = torch.zeros(side, side, dtype=torch.uint8)
        if index % 2:
            image[:, side // 4 : side // 2, side // 4 : side // 2] = 255
            mask[side // 4 : side // 2, side // 4 : side // 2] = 1
        return Sample(f"part-{index}", image, label=index % 2, extra={"mask": mask})


class Arm:
    """A stage, its optimizer, and epochs over all pictures in order."""

    def __init__(self, keep: Keep, *, tower: str, images: int, batch: int, folder: Path) -> None:
        encoder, head = opened(tower)
        head = copy.deepcopy(head)
        head.context.requires_grad_(True)
        head.deep.requires_grad_(True)
        reader = Reader(encoder, head.read)
        how = replace(encoder.preprocess, size=(reader.size, reader.size), resize_mode="squash")
        source = Parts(images, reader.size)
        store = FeatureStore(source, produce(reader), how, folder, "key", keep=keep, batch_size=batch)
        wall, cpu = time.perf_counter(), time.process_time()
        store.fill(RunLog())
        self.filled = time.perf_counter() - wall, time.process_time() - cpu
        train = TrainConfig(steps=1, batch_size=batch, lr=1e-3)
        self.stage = PromptStage("prompts", train=train, store=store, encoder=encoder, head=head, grid=reader.grid)
        self.optimizer = torch.optim.AdamW(self.stage.param_groups(), lr=1e-3, betas=(0.5, 0.999), weight_decay=0.0)
        self.places = torch.arange(images).split(batch)

    def epoch(self) -> tuple[float, float, Tensor]:
        """Wall and CPU seconds, and the losses of the steps."""
        wall, cpu, losses = time.perf_counter(), time.process_time(), []
        for some in self.places:
            batch = Batch(torch.zeros(len(some), 3, 1, 1), [str(i) for i in some.tolist()], extra={"place": some})
            loss = self.stage(batch).loss
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
        return time.perf_counter() - wall, time.process_time() - cpu, torch.stack(losses)


def main() -> None:
    """Compare and time the arms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", choices=TOWERS, default="base")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: dict[str, list[tuple[float, float, Tensor]]] = {name: [] for name in ARMS}
    with tempfile.TemporaryDirectory() as where:
        shared = {"tower": options.tower, "images": options.images, "batch": options.batch_size}
        arms = {name: Arm(keep, folder=Path(where) / name, **shared) for name, keep in ARMS.items()}
        for _ in range(options.epochs):
            for name, arm in arms.items():
                found[name].append(arm.epoch())
    apart = 0.0
    for (_, _, anew), (_, _, kept) in zip(found["uncached"], found["cached"], strict=True):
        apart = max(apart, float(((anew - kept).abs() / anew.abs()).max()))
    if not apart <= 1e-4:
        sys.exit(f"the losses differ by {apart:.1e} of their size")
    losses = [float(losses.mean()) for _, _, losses in found["cached"]]
    result: dict[str, object] = {"settings": vars(options), "losses": losses, "largest_difference": apart, "aim": AIM}
    for k, kind in enumerate(("wall", "cpu")):
        plain, kept = (statistics.median(epoch[k] for epoch in found[name]) for name in ARMS)
        result[kind] = {
            "uncached_s": plain,
            "cached_s": kept,
            "times_faster": statistics.median(
                anew[k] / own[k] for anew, own in zip(found["uncached"], found["cached"], strict=True)
            ),
            "fill_s": arms["cached"].filled[k],
            "whole_run_times_faster": OFFICIAL_EPOCHS * plain / (arms["cached"].filled[k] + OFFICIAL_EPOCHS * kept),
        }
    if options.json:
        print(json.dumps(result))
        return
    print(f"{TOWERS[options.tower]}, {options.images} pictures, {options.epochs} epochs; losses differ by {apart:.1e}")
    for kind in ("wall", "cpu"):
        row: dict[str, float] = result[kind]  # type: ignore[assignment]
        print(
            f"{kind:5} uncached {row['uncached_s']:7.2f} s an epoch, cached {row['cached_s']:6.2f} s: "
            f"{row['times_faster']:.1f}x; filling {row['fill_s']:.2f} s; whole run {row['whole_run_times_faster']:.1f}x"
        )


if __name__ == "__main__":
    main()
