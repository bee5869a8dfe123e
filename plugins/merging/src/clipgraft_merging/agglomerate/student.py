"""The student's features at any size, with gradient: a plain ViT stays one, a SAM tower too."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor
from torch.nn import functional as F
from torch.nn.utils import parametrize

from clipgraft.encoders.base import ImageEncoder
from clipgraft.encoders.towers import VitImage
from clipgraft.errors import InputError
from clipgraft.types import FeatureRequest
from clipgraft_merging.samclip.image import SamImage

Positions = Literal["resize", "crop"]
SCALE, ASPECT = (math.sqrt(0.1), 1.0), (3 / 4, 4 / 3)
"""Of the random crop of positions: side, and width over height."""


@dataclass(frozen=True, slots=True)
class StudentFeatures:
    """``pooled`` (B, D); ``cls`` (B, W) or None; ``tokens`` (B, N, W') and ``tower`` (B, N, W) on ``grid`` (h, w).

    Of a ViT ``tokens`` are after the last norm and ``tower`` before it. Of a SAM tower with a CLIP head ``tokens`` are
    the head's, in the joint space, and ``tower`` what SAM's neck reads; it has no class token.
    """

    pooled: Tensor
    cls: Tensor | None
    tokens: Tensor
    tower: Tensor
    grid: tuple[int, int]

    def of(self, name: str) -> Tensor:
        """The features of that name."""
        found: Tensor | None = getattr(self, name)
        if found is None:
            raise InputError("this student has no class token; let the summary be read from pooled")
        return found


class Student(torch.nn.Module):
    """An image tower read at several sizes. ``widths`` {feature: width}; ``step`` pixels that sides are multiples of.

    ``positions`` "crop" trains with random crops of the position table (RADIO's cropped position embeddings): a
    position then means a place in some larger picture, which lets the tower run at other sizes. In eval mode the table
    is used as it is at its own size, so the result stays a plain tower.
    """

    def __init__(self, image: ImageEncoder, *, positions: Positions = "resize") -> None:
        super().__init__()
        if problem := why_no_student(image, positions=positions):
            raise InputError(problem)
        self.image, self.positions = image, positions

    @property
    def step(self) -> int:
        """Sides must be multiples of it [pixels]."""
        return int(self.image.sam.patch if isinstance(self.image, SamImage) else self.image.tower.patch_size[0])

    @property
    def widths(self) -> dict[str, int]:
        """Of ``pooled``, ``cls``, ``tokens`` and ``tower``."""
        image = self.image
        if isinstance(image, SamImage):
            return {"pooled": image.embed_dim, "tokens": image.embed_dim, "tower": image.sam.width}
        return {"pooled": image.embed_dim, "cls": image.width, "tokens": image.width, "tower": image.width}

    def forward(self, pixels: Tensor, generator: Generator | None = None) -> StudentFeatures:
        """Standardised pixels (B, 3, H, W') -> features."""
        if isinstance(self.image, SamImage):
            found = self.image(pixels, FeatureRequest(tokens=True, layers=(-1,)))
            return StudentFeatures(found.pooled, None, found.tokens, found.layers[-1], found.grid)
        tower: Any = self.image.tower
        h, w = (int(side) for side in tower.patch_size)
        height, width = pixels.shape[-2:]
        if height % h or width % w:
            raise InputError(f"a size of {height} x {width} is no multiple of the student's patch of {h} x {w} pixels")
        grid = (height // h, width // w)
        with parametrize.cached():
            x = tower.conv1(pixels).flatten(2).transpose(1, 2)
            x = x + self._positions(grid, len(x), generator).to(x.dtype)
            first = (tower.class_embedding + tower.positional_embedding[0]).to(x.dtype)
            x = tower.ln_pre(torch.cat([first.expand(len(x), 1, -1), x], 1))
            x = tower.transformer(x)
            pooled, _ = tower._pool(x)
            pooled = pooled if tower.proj is None else pooled @ tower.proj
            last = tower.ln_post(x)
        return StudentFeatures(pooled, last[:, 0], last[:, 1:], x[:, 1:], grid)

    def _positions(self, grid: tuple[int, int], batch: int, generator: Generator | None) -> Tensor:
        """(1 or B, N, W)."""
        tower: Any = self.image.tower  # type: ignore[union-attr]
        table = tower.positional_embedding[1:].unflatten(0, tuple(tower.grid_size))
        if self.positions == "resize":
            return resized_positions(table, grid)
        if self.training:
            return random_positions(table, grid, batch=batch, generator=generator)
        return cropped_positions(table, grid)


def resized_positions(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """(H, W', D) -> (1, h*w, D), bicubic; the table itself at its own grid."""
    if tuple(table.shape[:2]) == grid:
        return table.flatten(0, 1)[None]
    maps = table.permute(2, 0, 1)[None].float()
    maps = F.interpolate(maps, size=grid, mode="bicubic", antialias=True, align_corners=False)
    return maps.flatten(2).transpose(1, 2).to(table.dtype)


def cropped_positions(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """(H, W', D) -> (1, h*w, D) as RADIO evaluates: a square resize to the longer side, its upper left part.

    The table itself at its own (square) grid.
    """
    side = max(grid)
    maps = table.permute(2, 0, 1)[None]
    if tuple(maps.shape[2:]) != (side, side):
        maps = F.interpolate(maps.float(), size=(side, side), mode="bilinear", align_corners=False).to(table.dtype)
    return maps[:, :, : grid[0], : grid[1]].flatten(2).transpose(1, 2)


def random_positions(table: Tensor, grid: tuple[int, int], *, batch: int, generator: Generator | None = None) -> Tensor:
    """(H, W', D) -> (B, h*w, D): every picture's positions are a random rectangle of the table, sampled bilinearly."""
    device = table.device

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(batch, generator=generator).to(device) * (high - low) + low

    scale, aspect = uniform(*SCALE), uniform(math.log(ASPECT[0]), math.log(ASPECT[1])).exp().sqrt()
    size = torch.stack([scale * aspect, scale / aspect], 1).clamp(max=1)  # share of width and of height
    corner = torch.stack([uniform(0, 1), uniform(0, 1)], 1) * (1 - size)
    y, x = torch.meshgrid(
        (torch.arange(grid[0], device=device) + 0.5) / grid[0],
        (torch.arange(grid[1], device=device) + 0.5) / grid[1],
        indexing="ij",
    )
    places = torch.stack([x, y], -1)[None] * size[:, None, None] + corner[:, None, None]  # (B, h, w, 2) in [0, 1]
    maps = table.permute(2, 0, 1)[None].float().expand(batch, -1, -1, -1)
    found = F.grid_sample(maps, places * 2 - 1, mode="bilinear", padding_mode="border", align_corners=False)
    return found.flatten(2).transpose(1, 2).to(table.dtype)


def why_no_student(image: ImageEncoder, *, positions: Positions = "resize") -> str:
    """Why this tower can't learn here; empty when it can."""
    if isinstance(image, SamImage):
        return "" if positions == "resize" else "student.positions: a SAM tower resizes its positions; set it to resize"
    if not isinstance(image, VitImage):
        kind = type(getattr(image, "tower", image)).__name__
        return f"the student's tower is a {kind}; use a CLIP with open_clip's own ViT, or student.sam"
    tower = image.tower
    if tower.attn_pool is not None or tower.patch_size[0] != tower.patch_size[1]:
        return "the student's ViT pools with a block of its own or has oblong patches; use a plain ViT"
    return ""
