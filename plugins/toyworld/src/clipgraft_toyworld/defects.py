"""Inspection pictures: one large object on a background, half of them damaged, with the damage as a mask."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clipgraft_toyworld.captions import DEFECTS
from clipgraft_toyworld.render import canvas, draw, place, without_objects
from clipgraft_toyworld.world import BLOCK, SHAPES, Scene, Split, generator, join, sample_jitter, sample_scene


@dataclass(frozen=True)
class Inspections:
    """N pictures: `image` (N, 3, S, S) in [0, 1], `mask` (N, S, S) true on damage, `kind` (N,) 0 for flawless and

    1 + index into `DEFECTS` otherwise, `silhouette` (N, S, S) coverage of the intact object in [0, 1].
    """

    image: Tensor
    mask: Tensor
    kind: Tensor
    silhouette: Tensor
    scene: Scene


def inspections(
    split: Split, *, n: int, size: int, seed: int = 0, shapes: Sequence[str] = SHAPES, damaged: float = 0.5
) -> Inspections:
    """n pictures of objects of the named shapes; a larger n extends a smaller one."""
    parts = []
    for start in range(0, n, BLOCK):
        rng = generator(split, stream="defects", seed=seed, block=start // BLOCK)
        parts.append(_block(rng, size=size, shapes=shapes, damaged=damaged))
    return Inspections(
        image=torch.cat([part.image for part in parts])[:n],
        mask=torch.cat([part.mask for part in parts])[:n],
        kind=torch.cat([part.kind for part in parts])[:n],
        silhouette=torch.cat([part.silhouette for part in parts])[:n],
        scene=join([part.scene for part in parts])[:n],
    )


def _block(rng: torch.Generator, *, size: int, shapes: Sequence[str], damaged: float) -> Inspections:
    scene, jitter = sample_scene(BLOCK, rng), sample_jitter(BLOCK, rng)
    allowed = torch.tensor([SHAPES.index(shape) for shape in shapes])
    calm = torch.zeros(BLOCK, dtype=torch.long)
    scene = scene.with_values(
        shape=allowed[scene.shape % len(allowed)], quantity=calm, state=calm, presence=calm, texture=calm
    )
    objects = place(scene, jitter)
    objects = replace(
        objects,
        centre=jitter.shift[:, None].expand_as(objects.centre),
        radius=torch.full_like(objects.radius, 0.68) * jitter.scale[:, None],
    )
    intact = draw(objects, scene.background, jitter, size=size)
    empty = draw(without_objects(objects), scene.background, jitter, size=size).image
    silhouette = intact.instances[:, 0]
    kind = torch.randint(len(DEFECTS), (BLOCK,), generator=rng) + 1
    kind = torch.where(torch.rand(BLOCK, generator=rng) < damaged, kind, 0)

    # Damage sits around a point inside the object, turned by a random angle.
    x, y = canvas(size)
    inside = (silhouette > 0.9).float().flatten(1) + 1e-6
    spot = torch.multinomial(inside, 1, generator=rng)[:, 0]
    dx = x - x.flatten()[spot][:, None, None]
    dy = y - y.flatten()[spot][:, None, None]
    turn = torch.rand(BLOCK, 1, 1, generator=rng) * math.pi
    extent = 0.8 + 0.4 * torch.rand(BLOCK, 1, 1, generator=rng)
    bright = torch.rand(BLOCK, generator=rng) < 0.5
    u, v = dx * turn.cos() + dy * turn.sin(), dy * turn.cos() - dx * turn.sin()
    radius = (dx**2 + dy**2).sqrt()
    outside = torch.stack(  # signed distances of the four kinds, in half image sides
        [
            torch.maximum(v.abs() - 0.05 * extent, u.abs() - 0.45 * extent),
            radius - 0.16 * extent,
            (u**2 + 2 * v**2).sqrt() - 0.24 * extent,
            torch.maximum(u.abs(), v.abs()) - 0.27 * extent,
        ],
        1,
    )  # (B, 4, S, S)
    chosen = (kind - 1).clamp(min=0)
    distance = outside[torch.arange(BLOCK), chosen]
    strength = torch.tensor([1.0, 1.0, 0.75, 1.0])[chosen][:, None, None]
    cover = (0.5 - distance * (size / 2)).clamp(0, 1) * strength * silhouette * (kind > 0)[:, None, None]
    tone = torch.stack(
        [
            torch.where(bright, 0.95, 0.05)[:, None].expand(-1, 3),
            torch.zeros(BLOCK, 3),
            torch.tensor([0.35, 0.30, 0.05]).expand(BLOCK, 3),
        ],
        1,
    )  # (B, 3 kinds, 3)
    paint = tone[torch.arange(BLOCK), chosen.clamp(max=2)][:, :, None, None].expand_as(empty)
    paint = torch.where(
        (kind == len(DEFECTS))[:, None, None, None], empty, paint
    )  # a missing part shows the background
    image = intact.image + (paint - intact.image) * cover[:, None]
    return Inspections(image=image, mask=cover > 0.3, kind=kind, silhouette=silhouette, scene=scene)
