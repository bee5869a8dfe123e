"""Rebuilding every shipped model from nothing: one command, about 20 CPU-minutes of one thread.

Settings were chosen on the `tune` split; the numbers in the manifest are of the `test` split, measured on the fp16
weights as they lie on disk. A build that was interrupted goes on where it stopped when it is given the same folder.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipgraft.errors import InputError
from clipgraft.files import sha256_of, write_json
from clipgraft_toyworld import mask_teacher, sam_teacher, text_teacher, train_generator, train_image, train_text
from clipgraft_toyworld.measure import Album, album, measure, measure_oracle
from clipgraft_toyworld.towers import SCALE, build_clip, load_clip, save_clip
from clipgraft_toyworld.world import BLOCK, WORLD_VERSION, Scene

COMMAND = "clipgraft toyworld build --out DIR"
POOL_BLOCKS = 320
BASES = (0, 1, 2)
Recipe = dict[str, Any]
Metrics = dict[str, float]
Make = Callable[[Path], Metrics]


@dataclass
class Builder:
    """One build: where it goes, who is told, how much of the steps is done."""

    out: Path
    say: Callable[[str], None] = print
    effort: float = 1.0
    entries: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def pool(self) -> Album:
        """The training pictures, rendered when the first model needs them."""
        return album("train", blocks=max(8, round(POOL_BLOCKS * self.effort)))

    def steps(self, full: int) -> int:
        """Steps at this effort."""
        return max(2, round(full * self.effort))

    def resume(self) -> None:
        """Take up the entries of an earlier build of the same world in the same folder."""
        path = self.out / "manifest.json"
        if path.is_file():
            document = json.loads(path.read_text(encoding="utf-8"))
            if document.get("world") == WORLD_VERSION:
                self.entries = document["models"]

    def model(self, name: str, *, seed: int, recipe: Recipe, make: Make) -> None:
        """Build one model unless its recipe, seed and hashes are already there; `make` fills a folder and measures."""
        entry, folder = self.entries.get(name), self.out / name
        if entry and entry["seed"] == seed and entry["recipe"] == recipe and entry["files"] == _hashes(folder):
            self.say(f"{name}: there already")
            return
        began = time.process_time()
        folder.mkdir(parents=True, exist_ok=True)
        metrics = make(folder)
        seconds = round(time.process_time() - began, 1)
        self.entries[name] = {
            "seed": seed,
            "cpu_seconds": seconds,
            "recipe": recipe,
            "metrics": {key: round(value, 4) for key, value in metrics.items()},
            "files": _hashes(folder),
        }
        document = {"world": WORLD_VERSION, "command": COMMAND, "models": self.entries}
        write_json(self.out / "manifest.json", document)
        told = ", ".join(f"{key} {value:.3f}" for key, value in metrics.items() if "/" not in key)
        self.say(f"{name}: {seconds:.0f} CPU-s, {told}")


def build(out: Path, *, say: Callable[[str], None] = print, effort: float = 1.0) -> Path:
    """Train everything into `out` and return the manifest; `effort` scales every number of steps (for rehearsals)."""
    if not hasattr(torch.optim, "Muon"):
        raise InputError(f"building needs torch 2.9 or later for torch.optim.Muon, here is {torch.__version__}")
    out.mkdir(parents=True, exist_ok=True)
    builder = Builder(out, say, effort)
    builder.resume()
    for seed in BASES:
        _base(builder, seed=seed)
    _teacher(builder)
    _generator(builder, "generator", tower="teacher")
    _generator(builder, "generator-own", tower="clip-0")
    _mask_teacher(builder)
    _text_teacher(builder)
    _sam_teacher(builder)
    return out / "manifest.json"


def _base(builder: Builder, *, seed: int) -> None:
    """Text tower, sight, lazy training: a CLIP that is blind to detail."""
    text = {"steps": builder.steps(train_text.STEPS), "batch": train_text.BATCH}
    sight = {"steps": builder.steps(train_image.SIGHT_STEPS), "batch": train_image.SIGHT_BATCH}
    lazy = {"steps": builder.steps(train_image.LAZY_STEPS), "batch": train_image.LAZY_BATCH}

    def make(folder: Path) -> Metrics:
        clip: Any = build_clip(seed)
        oracle = train_text.train_text_tower(clip, seed=seed, steps=text["steps"])
        clip.requires_grad_(False)
        clip.visual.requires_grad_(True)
        reader = train_image.train_sight(clip, builder.pool, seed=seed, steps=sight["steps"])
        train_image.train_lazy(clip, reader, builder.pool, seed=seed, steps=lazy["steps"])
        with torch.no_grad():
            clip.logit_scale.fill_(math.log(SCALE))
        save_clip(clip, folder)

        @torch.no_grad()
        def know(scene: Scene) -> Tensor:
            nothing = torch.zeros(len(scene), dtype=torch.long)
            return oracle(scene, nothing, nothing)

        saved = load_clip(folder)
        ceiling = measure_oracle(know, saved, "test")
        return measure(saved, "test") | {"oracle_pair": ceiling["pair"], "oracle_detail": ceiling["detail"]}

    recipe = {"text": text, "sight": sight, "lazy": lazy, "blocks": round(POOL_BLOCKS * builder.effort)}
    builder.model(f"clip-{seed}", seed=seed, recipe=recipe, make=make)


def _teacher(builder: Builder) -> None:
    """A detail-aware image tower against base 0's text tower: the measured ceiling, and this world's latent.

    It starts from another base's image tower, so that it shares no initialisation with base 0.
    """
    start = f"clip-{BASES[-1]}"
    recipe: Recipe = {
        "steps": builder.steps(train_image.TEACHER_STEPS),
        "batch": train_image.TEACHER_BATCH,
        "text": "clip-0",
        "image_start": start,
    }

    def make(folder: Path) -> Metrics:
        clip: Any = load_clip(builder.out / "clip-0")
        eyes: Any = load_clip(builder.out / start)
        clip.visual.load_state_dict(eyes.visual.state_dict())
        clip.requires_grad_(False)
        clip.visual.requires_grad_(True)
        train_image.train_teacher(clip, builder.pool, seed=0, steps=recipe["steps"])
        save_clip(clip, folder)
        return measure(load_clip(folder), "test")

    builder.model("teacher", seed=0, recipe=recipe, make=make)


def _generator(builder: Builder, name: str, *, tower: str) -> None:
    """A generator over a tower's patch tokens, conditioned on base 0's text; its metrics are sensitivities."""
    recipe: Recipe = {
        "steps": builder.steps(train_generator.STEPS),
        "batch": train_generator.BATCH,
        "text": "clip-0",
        "tokens": tower,
    }

    def make(folder: Path) -> Metrics:
        clip, source = load_clip(builder.out / "clip-0"), load_clip(builder.out / tower)
        data = train_generator.bench(source, builder.pool, n=len(builder.pool) // 2)
        train_generator.train_generator(clip, data, seed=0, steps=recipe["steps"]).save(folder)
        exam = train_generator.bench(source, album("test", blocks=2, seed=1), n=512)
        return train_generator.sensitivity(train_generator.load_generator(folder), clip, exam)

    builder.model(name, seed=0, recipe=recipe, make=make)


def _mask_teacher(builder: Builder) -> None:
    recipe = {"steps": builder.steps(mask_teacher.STEPS), "batch": mask_teacher.BATCH}

    def make(folder: Path) -> Metrics:
        mask_teacher.save_mask_teacher(mask_teacher.train_mask_teacher(seed=0, steps=recipe["steps"]), folder)
        return mask_teacher.measure_mask_teacher(mask_teacher.load_mask_teacher(folder))

    builder.model("mask-teacher", seed=0, recipe=recipe, make=make)


def _sam_teacher(builder: Builder) -> None:
    pool = max(BLOCK * 4, round(sam_teacher.POOL * builder.effort))
    recipe = {"steps": builder.steps(sam_teacher.STEPS), "batch": sam_teacher.BATCH, "pool": pool}

    def make(folder: Path) -> Metrics:
        model = sam_teacher.train_sam_teacher(seed=0, steps=recipe["steps"], pool=pool)
        sam_teacher.save_sam_teacher(model, folder)
        return sam_teacher.measure_sam_teacher(sam_teacher.load_sam_teacher(folder))

    builder.model("sam-teacher", seed=0, recipe=recipe, make=make)


def _text_teacher(builder: Builder) -> None:
    recipe = {"steps": builder.steps(text_teacher.STEPS), "batch": text_teacher.BATCH}

    def make(folder: Path) -> Metrics:
        text_teacher.save_text_teacher(text_teacher.train_text_teacher(seed=0, steps=recipe["steps"]), folder)
        return text_teacher.measure_text_teacher(text_teacher.load_text_teacher(folder))

    builder.model("text-teacher", seed=0, recipe=recipe, make=make)


def _hashes(folder: Path) -> dict[str, dict[str, Any]]:
    """Name to hash and size of every file of a model."""
    if not folder.is_dir():
        return {}
    return {file.name: {"sha256": sha256_of(file), "bytes": file.stat().st_size} for file in sorted(folder.iterdir())}
