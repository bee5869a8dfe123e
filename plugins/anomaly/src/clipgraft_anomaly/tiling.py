"""Large pictures in overlapping tiles: where they lie, and how their maps become one.

H x W' is the picture, in pixels; boxes are [top, bottom) x [left, right) of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from clipgraft.errors import InputError

if TYPE_CHECKING:
    from clipgraft.data.base import Picture


@dataclass(frozen=True, slots=True)
class Tiling:
    """Tiles of ``tile`` x ``tile`` pixels of the picture, of which neighbours share at least ``overlap`` pixels."""

    tile: int
    overlap: int = 0

    def __post_init__(self) -> None:
        if self.tile < 1 or not 0 <= self.overlap < self.tile:
            raise InputError(
                f"tiles of {self.tile} px can't overlap by {self.overlap} px; give --tile above --overlap, such as "
                "--tile 1024 --overlap 128"
            )

    def boxes(self, size: tuple[int, int]) -> list[Box]:
        """The tiles of a picture (H, W'), row by row; the picture itself when it isn't larger than one."""
        rows, columns = self.spans(size[0]), self.spans(size[1])
        return [Box(top, bottom, left, right) for top, bottom in rows for left, right in columns]

    def spans(self, length: int) -> list[tuple[int, int]]:
        """[start, end) of the tiles along one side, equally far apart, from edge to edge."""
        if length <= self.tile:
            return [(0, length)]
        rest = length - self.tile
        steps = ceil(rest / (self.tile - self.overlap))
        starts = [round(k * rest / steps) for k in range(steps + 1)]
        return [(start, start + self.tile) for start in starts]


@dataclass(frozen=True, slots=True)
class Box:
    """Part of a picture."""

    top: int
    bottom: int
    left: int
    right: int

    def crop(self, picture: Picture) -> Picture:
        """This part of a PIL image or of a tensor (3, H, W')."""
        if isinstance(picture, Tensor):
            return picture[:, self.top : self.bottom, self.left : self.right]
        return picture.crop((self.left, self.top, self.right, self.bottom))


class Mosaic:
    """The weighted mean of the maps of all tiles, at the picture's size.

    A tile's weight falls linearly to zero towards its edges within the overlap, so that no edge shows in the mean.
    """

    def __init__(self, size: tuple[int, int], tiling: Tiling) -> None:
        self._map = torch.zeros(size)
        self._rows = _shares(tiling.spans(size[0]), size[0], ramp=tiling.overlap)
        self._columns = _shares(tiling.spans(size[1]), size[1], ramp=tiling.overlap)

    def add(self, box: Box, scores: Tensor) -> None:
        """The map (S, S) of one tile."""
        height, width = box.bottom - box.top, box.right - box.left
        rows, columns = self._rows[box.top, box.bottom], self._columns[box.left, box.right]
        here = self._map[box.top : box.bottom, box.left : box.right]
        here.addcmul_(resized(scores, (height, width)), rows[:, None] * columns)

    def map(self) -> Tensor:
        """(H, W'), after every tile was added."""
        return self._map


def resized(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """A map (h, w) at another size (H, W'): bilinear, corners not aligned, smoothed first where it shrinks."""
    if tuple(scores.shape) == size:
        return scores
    shrinks = size[0] < scores.shape[0] or size[1] < scores.shape[1]
    return F.interpolate(scores[None, None], size, mode="bilinear", align_corners=False, antialias=shrinks)[0, 0]


def _shares(spans: Sequence[tuple[int, int]], length: int, *, ramp: int) -> dict[tuple[int, int], Tensor]:
    """{span: its share of the mean at each of its pixels}; shares of all spans sum to 1 everywhere.

    Shares of tiles are products of those of rows and of columns, because the sum over a grid factors.
    """
    weights, total = {}, torch.zeros(length)
    for start, end in spans:
        at = torch.arange(end - start) + 0.5
        weights[start, end] = torch.minimum(at, at.flip(0)).clamp(max=max(ramp, 1))
        total[start:end] += weights[start, end]
    return {(start, end): weight / total[start:end] for (start, end), weight in weights.items()}
