"""Signed distances of the eight object shapes, tabulated once and looked up per pixel.

Every shape fits the unit disc, "up" is v = -1, and none looks alike upside down, so that orientation can be
read. Distances are negative inside (formulas: https://iquilezles.org/articles/distfunctions2d/).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from clipgraft_toyworld.world import SHAPES

EXTENT = 2.6
"""The table covers [-EXTENT, EXTENT] in both directions, in object radii."""
CELLS = 208

_POLYGONS: dict[str, tuple[tuple[float, float], ...]] = {
    "triangle": ((0, -0.98), (0.7, 0.7), (-0.7, 0.7)),
    "arrow": ((0, -1), (0.85, -0.05), (0.3, -0.05), (0.3, 0.95), (-0.3, 0.95), (-0.3, -0.05), (-0.85, -0.05)),
    "tee": (
        (-0.9, -0.8),
        (0.9, -0.8),
        (0.9, -0.22),
        (0.3, -0.22),
        (0.3, 0.92),
        (-0.3, 0.92),
        (-0.3, -0.22),
        (-0.9, -0.22),
    ),
    "ell": ((-0.65, -0.95), (-0.05, -0.95), (-0.05, 0.3), (0.75, 0.3), (0.75, 0.9), (-0.65, 0.9)),
    "crown": ((-0.9, -0.75), (-0.42, -0.1), (0, -0.85), (0.42, -0.1), (0.9, -0.75), (0.9, 0.75), (-0.9, 0.75)),
}


def polygon_distance(u: Tensor, v: Tensor, *, corners: tuple[tuple[float, float], ...]) -> Tensor:
    """Signed distance from (u, v), any shape, to a simple polygon."""
    squared = torch.full_like(u, torch.inf)
    sign = torch.ones_like(u)
    for (x0, y0), (x1, y1) in zip(corners, corners[-1:] + corners[:-1], strict=True):
        ex, ey, wx, wy = x1 - x0, y1 - y0, u - x0, v - y0
        along = ((wx * ex + wy * ey) / (ex * ex + ey * ey)).clamp(0, 1)
        squared = torch.minimum(squared, (wx - ex * along) ** 2 + (wy - ey * along) ** 2)
        above, below, left = v >= y0, v < y1, ex * wy > ey * wx
        sign = torch.where((above & below & left) | (~above & ~below & ~left), -sign, sign)
    return sign * squared.sqrt()


def disc_distance(u: Tensor, v: Tensor, *, x: float, y: float, radius: float) -> Tensor:
    """Signed distance from (u, v) to a disc."""
    return ((u - x) ** 2 + (v - y) ** 2).sqrt() - radius


def distance(name: str, u: Tensor, v: Tensor) -> Tensor:
    """Signed distance from (u, v), in object radii, to the named shape."""
    if name in _POLYGONS:
        return polygon_distance(u, v, corners=_POLYGONS[name])
    if name == "heart":
        lobes = torch.minimum(
            disc_distance(u, v, x=-0.44, y=-0.35, radius=0.49), disc_distance(u, v, x=0.44, y=-0.35, radius=0.49)
        )
        return torch.minimum(lobes, polygon_distance(u, v, corners=((-0.88, -0.15), (0.88, -0.15), (0, 0.95))))
    if name == "moon":  # a crescent whose horns point up
        return torch.maximum(
            disc_distance(u, v, x=0, y=0, radius=0.97), -disc_distance(u, v, x=0, y=-0.66, radius=0.74)
        )
    if name == "spoon":
        stick = polygon_distance(u, v, corners=((-0.18, -0.2), (0.18, -0.2), (0.18, 0.98), (-0.18, 0.98)))
        return torch.minimum(disc_distance(u, v, x=0, y=-0.44, radius=0.54), stick)
    raise KeyError(name)


@functools.cache
def distance_table() -> Tensor:
    """(len(SHAPES) * CELLS * CELLS,) distances at cell centres, row-major per shape."""
    centres = ((torch.arange(CELLS) + 0.5) / CELLS * 2 - 1) * EXTENT
    v, u = torch.meshgrid(centres, centres, indexing="ij")
    return torch.stack([distance(name, u, v) for name in SHAPES]).flatten()


def lookup(shape: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Signed distances (N, H, W) of object coordinates u, v (N, H, W) to shapes (N,); nearest cell, exact to .02."""
    column = ((u + EXTENT) * (CELLS / (2 * EXTENT))).clamp_(0, CELLS - 1).int()
    row = ((v + EXTENT) * (CELLS / (2 * EXTENT))).clamp_(0, CELLS - 1).int()
    cell = row.mul_(CELLS).add_(column).add_((shape.int() * (CELLS * CELLS))[:, None, None])
    return distance_table()[cell]
