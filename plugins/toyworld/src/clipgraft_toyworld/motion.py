"""Short videos whose class no single frame tells.

Position, size, angle and opacity of the one object are drawn from fixed laws on a circle and *one* of them advances by
a constant step per frame. So the law of frame t is the same for every t and every class, and a video played backwards
is a video of the opposite class. In *calm* videos the other four stay what they are in a picture of the scene, so that
frames tell what kind of motion it is, never in which direction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clipgraft_toyworld.captions import MOTIONS
from clipgraft_toyworld.render import draw, place
from clipgraft_toyworld.world import BLOCK, SHAPES, Scene, Split, generator, join, sample_jitter, sample_scene

FRAMES = 8
STATIC = ("x", "y", "size", "angle", "opacity")
"""What moves in classes 0-1, 2-3, 4-5, 6-7 and 8-9; the even class runs downwards, except that growth comes first."""


@dataclass(frozen=True)
class Videos:
    """N videos: `frames` (N, T, 3, S, S) uint8, `label` (N,) index into `MOTIONS`, the scene of the object,

    `number` (N,) of each among all of its split.
    """

    frames: Tensor
    label: Tensor
    scene: Scene
    number: Tensor


def videos(
    split: Split,
    *,
    n: int,
    size: int,
    seed: int = 0,
    frames: int = FRAMES,
    shapes: Sequence[int] = (),
    motions: Sequence[int] = (),
    parity: int | None = None,
    calm: bool = False,
) -> Videos:
    """n videos, of the given shapes and motions only; a larger n extends a smaller one, and a choice changes none.

    ``parity`` 0 or 1: only pairs of a shape and a motion whose places among the given ones add up so, modulo 2.
    """
    chunk = BLOCK // 4  # frames of a block are rendered together
    parts, found, start = list[Videos](), 0, 0
    wanted = torch.zeros(len(SHAPES), len(MOTIONS), dtype=torch.bool)
    for row, shape in enumerate(shapes or range(len(SHAPES))):
        for column, motion in enumerate(motions or range(len(MOTIONS))):
            wanted[shape, motion] = parity is None or (row + column) % 2 == parity
    while found < n:
        rng = generator(split, stream="videos", seed=seed, block=start // chunk)
        part = _block(rng, n=chunk, size=size, frames=frames, calm=calm)
        rows = wanted[part.scene.shape, part.label].nonzero()[: n - found, 0]
        parts.append(Videos(part.frames[rows], part.label[rows], part.scene[rows], rows + start))
        found, start = found + len(rows), start + chunk
    return Videos(
        frames=torch.cat([part.frames for part in parts]),
        label=torch.cat([part.label for part in parts]),
        scene=join([part.scene for part in parts]),
        number=torch.cat([part.number for part in parts]),
    )


def phases(label: Tensor, start: Tensor, step: Tensor, *, frames: int) -> Tensor:
    """Phases (B, T, 5) in [0, 1) of `STATIC`: `start` (B, 5) plus `step` (B,) per frame in the one that moves."""
    axis = torch.div(label, 2, rounding_mode="floor")
    forward = (label % 2 == 1) ^ (axis >= 2)  # left, up are negative; growing, clockwise, fading in are positive
    speed = torch.where(forward, step, -step)
    moves = torch.nn.functional.one_hot(axis, len(STATIC)) * speed[:, None]  # (B, 5)
    return (start[:, None] + torch.arange(frames)[None, :, None] * moves[:, None]) % 1.0


def _block(rng: torch.Generator, *, n: int, size: int, frames: int, calm: bool = False) -> Videos:
    scene = sample_scene(n, rng)
    scene = scene.with_values(quantity=torch.zeros(n, dtype=torch.long))
    jitter = sample_jitter(n, rng)
    label = torch.randint(len(MOTIONS), (n,), generator=rng)
    start = torch.rand(n, len(STATIC), generator=rng)
    step = 0.06 + 0.03 * torch.rand(n, generator=rng)
    phase = phases(label, start, step, frames=frames)
    objects = place(scene, jitter)
    held = torch.arange(len(STATIC)) != torch.div(label, 2, rounding_mode="floor")[:, None]  # (B, 5)
    held &= torch.tensor(calm)
    shots = []
    for t in range(frames):
        x, y, scale, turn, opacity = phase[:, t].unbind(1)
        centre = torch.stack([x, y], 1) * 1.8 - 0.9
        moved = replace(
            objects,
            centre=torch.where(held[:, None, :2], objects.centre, centre[:, None]),
            radius=torch.where(held[:, 2:3], objects.radius, (0.32 + 0.36 * scale)[:, None]),
            angle=torch.where(held[:, 3:4], objects.angle, (turn * 2 * math.pi)[:, None]),
            opacity=torch.where(held[:, 4:], objects.opacity, (0.25 + 0.75 * opacity)[:, None]),
        )
        shots.append((draw(moved, scene.background, jitter, size=size).image * 255).round().to(torch.uint8))
    return Videos(frames=torch.stack(shots, 1), label=label, scene=scene, number=torch.arange(n))
