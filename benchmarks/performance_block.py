"""CPU time of a training step under the settings of the block ``performance``, on a transformer and on a ResNet.

Every setting is a run's own: the stage of ``core/finetune`` in ``Trainer.fit``, random weights, noise images in memory,
one thread. Settings take turns in one process, block by block; the median over the blocks of a setting's time over the
default's in the same block counts. A block's first steps, in which compiled code is made, are left out of its time and
told apart for the first block.

    OMP_NUM_THREADS=1 python benchmarks/performance_block.py [--models ViT-B-32,RN50] [--blocks 3] [--steps 4]
        [--batch-size 4] [--only NAME,NAME] [--json | --markdown]
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from table import table
from trainer_overhead import Clock, Noise

from clipgraft import performance
from clipgraft.config.schema import DataConfig, ModelConfig, RunConfig, TrainConfig
from clipgraft.encoders import load
from clipgraft.encoders.base import Encoder
from clipgraft.finetune import FinetuneStage
from clipgraft.log import RunLog
from clipgraft.losses.contrastive import ClipLoss
from clipgraft.registry import Registry
from clipgraft.runner import Run
from clipgraft.trainer import Trainer

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "channels_last": {"performance": {"channels_last": True}},
    "plain attention": {"performance": {"attention": "math"}},
    "bf16": {"precision": "bf16"},
    "compile": {"performance": {"compile": True}},
    "compile, bf16": {"performance": {"compile": True}, "precision": "bf16"},
    "auto": {"performance": "auto"},
}


def fitted(encoder: Encoder, settings: dict[str, Any], train: TrainConfig, folder: Path) -> tuple[float, float]:
    """CPU seconds of a step of one run, and of its first step beyond that."""
    source = Noise(encoder.preprocess.size[0])
    stage = FinetuneStage("train", train=train, source=source, encoder=encoder, losses=[ClipLoss()], weights=(1.0,))
    config = RunConfig(model=ModelConfig(**{"from": "shared"}), data=DataConfig(**{"from": "noise"}), **settings)
    config, _ = performance.settled(config)
    registry = Registry.discover(allow=[])
    run = Run(folder, config, registry.get("recipe", "core/finetune"), registry, RunLog(is_main=False))
    run.encoder, clock = encoder, Clock()
    run.hooks.register(clock, "clock")
    with performance.kernels(config.performance):
        Trainer(train).fit(run, stage)
    steps = [b - a for a, b in pairwise(clock.ticks)]
    usual = statistics.median(steps[2:])
    return usual, steps[0] - usual


def main() -> None:
    """Print the table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="ViT-B-32,RN50", help="open_clip architectures with random weights")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="per block, beside three that are not timed")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--only", default=",".join(name.replace(", ", "+") for name in SETTINGS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # there are no pretrained weights, on purpose
    names = ["default", *(n for n in SETTINGS if n != "default" and n.replace(", ", "+") in options.only.split(","))]
    train = TrainConfig(steps=options.steps + 3, batch_size=options.batch_size, lr=1e-6, schedule="constant")
    rows: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as place:
        for model in options.models.split(","):
            encoder = load(f"open_clip:{model}")
            blocks: list[dict[str, tuple[float, float]]] = []
            for block in range(options.blocks):
                folder = Path(place) / model / str(block)
                blocks.append({name: fitted(encoder, SETTINGS[name], train, folder / name) for name in names})
            rows[model] = {
                name: {
                    "cpu_ms": statistics.median(found[name][0] for found in blocks) * 1e3,
                    "times_faster": statistics.median(found["default"][0] / found[name][0] for found in blocks),
                    "first_step_s": blocks[0][name][1],
                }
                for name in names
            }
    if options.json:
        print(json.dumps({"batch_size": options.batch_size, "models": rows}))
        return
    cells = [
        [f"{model}, {name}", f"{r['cpu_ms']:.0f}", f"{r['times_faster']:.2f}", f"{r['first_step_s']:.1f}"]
        for model, found in rows.items()
        for name, r in found.items()
    ]
    print(
        table(
            ["setting", "CPU ms per step", "times as fast", "first step besides, s"], cells, markdown=options.markdown
        )
    )


if __name__ == "__main__":
    main()
