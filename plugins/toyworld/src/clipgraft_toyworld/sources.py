"""The world as data sources: rendered once at construction, kept in memory as uint8, identical for equal settings.

Each class is the target of a registered dataset; its config model carries the same fields.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from clipgraft.config.schema import Config
from clipgraft.data.base import Pair, Sample
from clipgraft.errors import unknown_name
from clipgraft_toyworld.captions import (
    TEMPLATES,
    detailed_captions,
    long_captions,
    reworded_captions,
    short_captions,
    story_captions,
)
from clipgraft_toyworld.pairs import as_bytes, minimal_pairs
from clipgraft_toyworld.render import render
from clipgraft_toyworld.world import (
    BLOCK,
    COLORS,
    DETAILS,
    SHAPES,
    SPLITS,
    WORLD_VERSION,
    Scene,
    Split,
    class_names,
    generator,
    join,
    sample_jitter,
    sample_scene,
)

Captions = Literal["short", "long", "detailed", "reworded", "story"]
DETAIL_TEMPLATES = ("{}", "object {}", "a object {}", "a photo of a object {}")
"""Prompts for the values of a detail, which stand behind the thing that they describe."""


class WorldConfig(Config):
    """What every source of the world takes."""

    split: Split = Field("train", description="never share a picture")
    n: int = Field(2048, gt=0, description="number of samples")
    size: Literal[32, 64] = Field(32, description="image side [pixels]")
    seed: int = Field(0, ge=0, lt=2048, description="other pictures of the same split")


class ImagesConfig(WorldConfig):
    """Images with captions."""

    captions: Captions = Field(
        "short", description="short leaves most out, long names everything, detailed 1-9 details, story about 64 tokens"
    )
    per_image: int = Field(1, gt=0, description="captions per image")
    masks: bool = Field(False, description="add extra masks: instances (3, S, S) and semantics (S, S), uint8")
    label: str = Field("class", description="what the classes are: class (colour and shape), or one attribute")
    only: tuple[str, ...] = Field((), description="attribute values to keep, such as white background; empty keeps all")


class MinimalPairsConfig(Config):
    """Minimal pairs."""

    split: Split = Field("test", description="never share a picture")
    per_pattern: int = Field(64, gt=0, le=2**16, description="pairs of each of the nine patterns")
    size: Literal[32, 64] = Field(32, description="image side [pixels]")
    seed: int = Field(0, ge=0, lt=2048, description="other pictures of the same split")


def scene_attributes() -> dict[str, tuple[str, ...]]:
    """Value names of every attribute of a scene."""
    return {"shape": SHAPES, "color": COLORS, **{detail.name: detail.phrases for detail in DETAILS}}


def kept_values(only: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Value names -> {attribute: the values of it that may occur}; attributes that no name belongs to are free."""
    known = {value: (name, k) for name, values in scene_attributes().items() for k, value in enumerate(values)}
    found: dict[str, tuple[int, ...]] = {}
    for value in only:
        if value not in known:
            raise unknown_name("attribute value", value, known)
        name, k = known[value]
        found[name] = (*found.get(name, ()), k)
    return found


def _rows(scene: Scene, kept: Mapping[str, tuple[int, ...]]) -> Tensor:
    """(n,) indices of the scenes whose attributes all have values that are kept."""
    fine = torch.ones(len(scene), dtype=torch.bool)
    for name, values in kept.items():
        fine &= torch.isin(scene.value(name), torch.tensor(values))
    return torch.nonzero(fine)[:, 0]


def caption(scene: Scene, rng: random.Random, kind: Captions) -> list[str]:
    """One caption of the given kind per scene."""
    if kind == "short":
        return short_captions(scene, rng)
    if kind == "long":
        return long_captions(scene, rng)
    if kind == "detailed":
        return detailed_captions(scene, rng, counts=range(1, len(DETAILS) + 1))
    return story_captions(scene, rng) if kind == "story" else reworded_captions(scene, rng)


def fingerprint(name: str, **settings: object) -> str:
    """Changes with the world's version, the source and every setting."""
    told = f"{name}|{WORLD_VERSION}|" + "|".join(f"{key}={settings[key]!r}" for key in sorted(settings))
    return hashlib.sha256(told.encode()).hexdigest()[:16]


class Images:
    """`toyworld/images`: pictures of scenes with captions, 64 classes, eleven attributes, optionally masks.

    `only` leaves scenes out, it changes none: what is left has the ids, pixels and captions that it has without.
    """

    def __init__(
        self,
        *,
        split: Split = "train",
        n: int = 2048,
        size: int = 32,
        seed: int = 0,
        captions: Captions = "short",
        per_image: int = 1,
        masks: bool = False,
        label: str = "class",
        only: Sequence[str] = (),
    ) -> None:
        self.name = "toyworld/images"
        settings = {"split": split, "n": n, "size": size, "seed": seed, "captions": captions, "per_image": per_image}
        chosen = {"label": label} if label != "class" else {}
        chosen |= {"only": tuple(only)} if only else {}
        self.fingerprint = fingerprint(self.name, **settings, masks=masks, **chosen)
        self.attributes: Mapping[str, Sequence[str]] = scene_attributes()
        if label not in ("class", *self.attributes):
            raise unknown_name("label", label, ["class", *self.attributes])
        self.classes: Sequence[str] = class_names() if label == "class" else self.attributes[label]
        self.segments: Sequence[str] = SHAPES if masks else ()
        self.templates: Sequence[str] = TEMPLATES if label in ("class", "shape", "color") else DETAIL_TEMPLATES
        kept = kept_values(only)
        pixels, scenes, instances, semantics = [], [], [], []
        self._captions: list[tuple[str, ...]] = []
        self._ids: list[str] = []
        block = 0
        while len(self._ids) < n:
            rng = generator(split, stream="images", seed=seed, block=block)
            scene, jitter = sample_scene(BLOCK, rng), sample_jitter(BLOCK, rng)
            rows = _rows(scene, kept)[: n - len(self._ids)]
            words = random.Random(f"{SPLITS.index(split)} {seed} {block}")
            told = list(zip(*[caption(scene, words, captions) for _ in range(per_image)], strict=True))
            start, block = block * BLOCK, block + 1
            if not len(rows):
                continue
            picture = render(scene, jitter, size=size)
            pixels.append(as_bytes(picture.image)[rows])
            scenes.append(scene[rows])
            self._captions += [told[row] for row in rows.tolist()]
            self._ids += [f"{split}-{seed}-{start + row}" for row in rows.tolist()]
            if masks:
                instances.append((picture.instances > 0.5).to(torch.uint8)[rows])
                semantics.append(picture.semantics.to(torch.uint8)[rows])
        self.pixels = torch.cat(pixels)
        self.scene = join(scenes)
        self._instances = torch.cat(instances) if masks else None
        self._semantics = torch.cat(semantics) if masks else None
        self._labels = (self.scene.coarse() if label == "class" else self.scene.value(label)).tolist()

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Sample:
        values = {name: int(self.scene.value(name)[index]) for name in self.attributes}
        extra: dict[str, Tensor] = {}
        if self._instances is not None and self._semantics is not None:
            extra = {"instances": self._instances[index], "semantics": self._semantics[index]}
        return Sample(
            id=self._ids[index],
            image=self.pixels[index],
            captions=self._captions[index],
            label=self._labels[index],
            attributes=values,
            extra=extra,
        )


class MinimalPairs:
    """`toyworld/pairs`: nine patterns of minimal pairs, each with `per_pattern` pairs."""

    def __init__(self, *, split: Split = "test", per_pattern: int = 64, size: int = 32, seed: int = 0) -> None:
        self.name = "toyworld/pairs"
        self.fingerprint = fingerprint(self.name, split=split, per_pattern=per_pattern, size=size, seed=seed)
        self.patterns: Sequence[str] = tuple(detail.name for detail in DETAILS)
        self._pairs = minimal_pairs(split, per_pattern=per_pattern, size=size, seed=seed)
        self._first, self._second = self._pairs.statements()
        self._prefix = f"{split}-{seed}-"

    def __len__(self) -> int:
        return len(self._first)

    def __getitem__(self, index: int) -> Pair:
        return Pair(
            id=f"{self._prefix}{range(len(self))[index]}",
            images=(self._pairs.first[index], self._pairs.second[index]),
            texts=(self._first[index], self._second[index]),
            pattern=self.patterns[int(self._pairs.detail[index])],
        )
