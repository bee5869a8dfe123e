"""Rebuilding every shipped model from nothing: one command, about 20 CPU-minutes of one thread.

Settings were chosen on the `tune` split; the numbers in the manifest are of the `test` split, measured on the fp16
weights as they lie on disk.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipgraft.errors import InputError
from clipgraft.files import sha256_of, write_json
from clipgraft_toyworld import train_generator, train_image, train_text
from clipgraft_toyworld.mask_teacher import (
    load_mask_teacher,
    measure_mask_teacher,
    save_mask_teacher,
    train_mask_teacher,
)
from clipgraft_toyworld.measure import Album, album, measure, measure_oracle
from clipgraft_toyworld.text_teacher import (
    load_text_teacher,
    measure_text_teacher,
    save_text_teacher,
    train_text_teacher,
)
from clipgraft_toyworld.towers import SCALE, build_clip, load_clip, save_clip
from clipgraft_toyworld.train_generator import bench, load_generator, sensitivity
from clipgraft_toyworld.world import WORLD_VERSION, Scene

COMMAND = "clipgraft toyworld build --out DIR"
POOL_BLOCKS = 320
BASES = (0, 1, 2)
Say = Callable[[str], None]


@dataclass
class _Builder:
    """What the steps of one build share."""

    out: Path
    say: Say
    entries: dict[str, Any] = field(default_factory=dict)

    def keep(self, name: str, *, began: float, seed: int, recipe: dict[str, Any], metrics: dict[str, Any]) -> None:
        """Hash the files of a finished model and write the manifest, so that an interrupted build shows what it did."""
        files = {
            file.name: {"sha256": sha256_of(file), "bytes": file.stat().st_size}
            for file in sorted((self.out / name).iterdir())
        }
        seconds = round(time.process_time() - began, 1)
        self.entries[name] = {
            "seed": seed,
            "cpu_seconds": seconds,
            "recipe": recipe,
            "metrics": _rounded(metrics),
            "files": files,
        }
        document = {"world": WORLD_VERSION, "command": COMMAND, "models": self.entries}
        write_json(self.out / "manifest.json", document)
        told = ", ".join(f"{key} {value:.3f}" for key, value in metrics.items() if "/" not in key)
        self.say(f"{name}: {seconds:.0f} CPU-s, {told}")


def build(out: Path, *, say: Say = print, effort: float = 1.0, bases: tuple[int, ...] = BASES) -> Path:
    """Train everything into `out` and return its manifest; `effort` scales every number of steps (for rehearsals)."""
    if not hasattr(torch.optim, "Muon"):
        raise InputError(f"building needs torch 2.9 or later for torch.optim.Muon, here is {torch.__version__}")
    out.mkdir(parents=True, exist_ok=True)
    builder = _Builder(out, say)
    pool = album("train", blocks=max(8, round(POOL_BLOCKS * min(1.0, effort))))
    sights: dict[int, dict[str, Tensor]] = {}
    for seed in bases:
        sights[seed] = _base(builder, pool, seed=seed, effort=effort)
    # The teacher of base 0 starts from another base's eyes, so that the two share no initialisation.
    _teacher(builder, pool, sights[bases[-1]], effort=effort)
    for name, tower in (("generator", "teacher"), ("generator-own", "clip-0")):
        _generator(builder, pool, name, tower=tower, effort=effort)
    _helpers(builder, effort=effort)
    return out / "manifest.json"


def _steps(steps: int, effort: float) -> int:
    return max(2, round(steps * effort))


def _base(builder: _Builder, pool: Album, *, seed: int, effort: float) -> dict[str, Tensor]:
    """Text tower, sight, lazy training of one base; returns the image tower after sight."""
    began, clip = time.process_time(), build_clip(seed)
    recipe = {
        "text": {"steps": _steps(train_text.STEPS, effort), "batch": train_text.BATCH},
        "sight": {"steps": _steps(train_image.SIGHT_STEPS, effort), "batch": train_image.SIGHT_BATCH},
        "lazy": {"steps": _steps(train_image.LAZY_STEPS, effort), "batch": train_image.LAZY_BATCH},
        "pool": len(pool),
    }
    oracle = train_text.train_text_tower(clip, seed=seed, steps=recipe["text"]["steps"])
    clip.requires_grad_(False)
    visual: Any = clip.visual
    visual.requires_grad_(True)
    reader = train_image.train_sight(clip, pool, seed=seed, steps=recipe["sight"]["steps"])
    sight = {name: value.clone() for name, value in visual.state_dict().items()}
    train_image.train_lazy(clip, reader, pool, seed=seed, steps=recipe["lazy"]["steps"])
    with torch.no_grad():
        scale: Any = clip.logit_scale
        scale.fill_(math.log(SCALE))
    save_clip(clip, builder.out / f"clip-{seed}")
    saved = load_clip(builder.out / f"clip-{seed}")

    def know(scene: Scene) -> Tensor:
        nothing = torch.zeros(len(scene), dtype=torch.long)
        with torch.no_grad():
            return oracle(scene, nothing, nothing)

    ceiling = measure_oracle(know, saved, "test")
    metrics: dict[str, Any] = measure(saved, "test")
    metrics |= {"oracle_pair": ceiling["pair"], "oracle_detail": ceiling["detail"]}
    builder.keep(f"clip-{seed}", began=began, seed=seed, recipe=recipe, metrics=metrics)
    return sight


def _teacher(builder: _Builder, pool: Album, sight: dict[str, Tensor], *, effort: float) -> None:
    """A detail-aware image tower against base 0's text tower: the measured ceiling, and the real latent."""
    began, steps = time.process_time(), _steps(train_image.TEACHER_STEPS, effort)
    clip = load_clip(builder.out / "clip-0")
    visual: Any = clip.visual
    visual.load_state_dict(sight)
    clip.requires_grad_(False)
    visual.requires_grad_(True)
    train_image.train_teacher(clip, pool, seed=0, steps=steps)
    save_clip(clip, builder.out / "teacher")
    recipe = {"steps": steps, "batch": train_image.TEACHER_BATCH, "text": "clip-0", "image": "sight of the last base"}
    metrics = measure(load_clip(builder.out / "teacher"), "test")
    builder.keep("teacher", began=began, seed=0, recipe=recipe, metrics=metrics)


def _generator(builder: _Builder, pool: Album, name: str, *, tower: str, effort: float) -> None:
    """A generator over a tower's patch tokens, conditioned on base 0's text."""
    began, steps = time.process_time(), _steps(train_generator.STEPS, effort)
    clip, source = load_clip(builder.out / "clip-0"), load_clip(builder.out / tower)
    data = bench(source, pool, n=len(pool) // 2)
    trained = train_generator.train_generator(clip, data, seed=0, steps=steps)
    trained.save(builder.out / name)
    exam = bench(source, album("test", blocks=2, seed=1), n=512)
    metrics = sensitivity(load_generator(builder.out / name), clip, exam)
    recipe = {
        "steps": steps,
        "batch": train_generator.BATCH,
        "text": "clip-0",
        "tokens": tower,
        "measured": "sensitivity",
    }
    builder.keep(name, began=began, seed=0, recipe=recipe, metrics=metrics)


def _helpers(builder: _Builder, *, effort: float) -> None:
    """Mask teacher and text teacher."""
    from clipgraft_toyworld import mask_teacher, text_teacher

    began, steps = time.process_time(), _steps(mask_teacher.STEPS, effort)
    place = builder.out / "mask-teacher"
    save_mask_teacher(train_mask_teacher(seed=0, steps=steps), place)
    recipe = {"steps": steps, "batch": mask_teacher.BATCH}
    builder.keep(
        "mask-teacher", began=began, seed=0, recipe=recipe, metrics=measure_mask_teacher(load_mask_teacher(place))
    )
    began, steps = time.process_time(), _steps(text_teacher.STEPS, effort)
    place = builder.out / "text-teacher"
    trained: nn.Module = train_text_teacher(seed=0, steps=steps)
    save_text_teacher(trained, place)
    recipe = {"steps": steps, "batch": text_teacher.BATCH}
    builder.keep(
        "text-teacher", began=began, seed=0, recipe=recipe, metrics=measure_text_teacher(load_text_teacher(place))
    )


def _rounded(metrics: dict[str, Any]) -> dict[str, Any]:
    return {key: round(float(value), 4) for key, value in metrics.items()}
