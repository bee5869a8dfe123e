"""Pictures with two different objects side by side, for segmentation by instance and by meaning."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clipgraft_toyworld.render import Picture, draw, place
from clipgraft_toyworld.world import BLOCK, COLORS, SHAPES, Split, generator, sample_jitter, sample_scene


@dataclass(frozen=True)
class Crowd:
    """N pictures; `shape` and `color` (N, 2) of the left and the right object."""

    picture: Picture
    shape: Tensor
    color: Tensor


def crowds(split: Split, *, n: int, size: int, seed: int = 0) -> Crowd:
    """n pictures of two objects with different shapes and colours; a larger n extends a smaller one."""
    parts = []
    for start in range(0, n, BLOCK):
        parts.append(_block(generator(split, stream="crowds", seed=seed, block=start // BLOCK), size=size))
    picture = Picture(
        image=torch.cat([part.picture.image for part in parts])[:n],
        instances=torch.cat([part.picture.instances for part in parts])[:n],
        semantics=torch.cat([part.picture.semantics for part in parts])[:n],
    )
    return Crowd(
        picture=picture,
        shape=torch.cat([part.shape for part in parts])[:n],
        color=torch.cat([part.color for part in parts])[:n],
    )


def _block(rng: torch.Generator, *, size: int) -> Crowd:
    scene, jitter = sample_scene(BLOCK, rng), sample_jitter(BLOCK, rng)
    calm = torch.zeros(BLOCK, dtype=torch.long)
    scene = scene.with_values(state=calm, texture=calm, quantity=calm + 1)
    objects = place(scene, jitter)

    def other(value: Tensor, values: int) -> Tensor:
        step = torch.randint(1, values, (BLOCK,), generator=rng)
        return torch.stack([value, (value + step) % values, value], 1)

    shape, color = other(scene.shape, len(SHAPES)), other(scene.color, len(COLORS))
    wobble = (torch.rand(BLOCK, 3, 2, generator=rng) - 0.5) * torch.tensor([0.16, 0.9])
    centre = torch.tensor([[-0.5, 0.0], [0.5, 0.0], [0.0, 0.0]]) + wobble
    radius = 0.38 + 0.14 * torch.rand(BLOCK, 3, generator=rng)
    moved = replace(objects, centre=centre, radius=radius, shape=shape, color=color)
    picture = draw(moved, scene.background, jitter, size=size)
    return Crowd(picture=picture, shape=shape[:, :2], color=color[:, :2])
