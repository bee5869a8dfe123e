"""Minimal pairs after MMVP: two pictures with one jitter that differ in one detail, and a statement for each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clipgraft_toyworld.captions import records, statement
from clipgraft_toyworld.render import render
from clipgraft_toyworld.world import DETAILS, Scene, Split, generator, join, sample_jitter, sample_scene

CHUNK = 64
"""Pairs drawn from one generator."""


@dataclass(frozen=True)
class Pairs:
    """P pairs, pattern by pattern: pictures (P, 3, S, S) uint8, their scenes, and which detail differs (P,)."""

    first: Tensor
    second: Tensor
    first_scene: Scene
    second_scene: Scene
    detail: Tensor

    def statements(self) -> tuple[list[str], list[str]]:
        """The sentence that is true of the first picture only, and the one true of the second only."""
        names = [DETAILS[index].name for index in self.detail.tolist()]
        one, two = records(self.first_scene), records(self.second_scene)
        return (
            [statement(record, name) for record, name in zip(one, names, strict=True)],
            [statement(record, name) for record, name in zip(two, names, strict=True)],
        )


def minimal_pairs(split: Split, *, per_pattern: int, size: int, seed: int = 0) -> Pairs:
    """`per_pattern` pairs of every detail; a larger number extends a smaller one."""
    first, second, first_scenes, second_scenes, detail = [], [], [], [], []
    for index, pattern in enumerate(DETAILS):
        for start in range(0, per_pattern, CHUNK):
            rng = generator(split, stream="pairs", seed=seed, block=index * 1024 + start // CHUNK)
            keep = slice(0, min(CHUNK, per_pattern - start))
            scene, jitter = sample_scene(CHUNK, rng), sample_jitter(CHUNK, rng)
            values = len(pattern.phrases)
            step = torch.randint(1, values, (CHUNK,), generator=rng)
            other = scene.with_values(**{pattern.name: (scene.value(pattern.name) + step) % values})
            first.append(as_bytes(render(scene, jitter, size=size).image)[keep])
            second.append(as_bytes(render(other, jitter, size=size).image)[keep])
            first_scenes.append(scene[keep])
            second_scenes.append(other[keep])
            detail.append(torch.full((keep.stop,), index))
    return Pairs(
        first=torch.cat(first),
        second=torch.cat(second),
        first_scene=join(first_scenes),
        second_scene=join(second_scenes),
        detail=torch.cat(detail),
    )


def as_bytes(image: Tensor) -> Tensor:
    """[0, 1] floats to uint8, rounded."""
    return image.mul(255).round_().to(torch.uint8)
