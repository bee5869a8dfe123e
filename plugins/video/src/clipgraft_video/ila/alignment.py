"""ILA's implicit alignment: for every pair of neighbouring frames, the place in each that they share, as a mask.

Tu et al., Implicit Temporal Modeling with Learnable Alignment for Video Recognition, ICCV 2023, arXiv 2304.10465.
Letters as elsewhere; C channels of the features of a pair.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft.errors import InputError

REACH = 0.75
"""Largest coordinate of a point; the picture reaches from -1 to 1."""
STEPS = ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0), (1, 1), (-1, -1), (1, -1), (-1, 1))


def masks(points: Tensor, grid: tuple[int, int]) -> Tensor:
    """Points (..., 2) as (x, y) in [-1, 1] -> weights (..., h, w): 1 within a quarter, then falling at 1.5 per unit.

    The weight of a cell is the product of those along x and y.
    """
    height, width = grid
    falls = []
    for size, at in ((height, points[..., 1]), (width, points[..., 0])):
        away = (torch.linspace(-1, 1, size, device=points.device, dtype=points.dtype) - at[..., None]).abs()
        falls.append((1 - 1.5 * (away - 0.25)).clamp(0, 1))
    return falls[0][..., :, None] * falls[1][..., None, :]


def per_frame(earlier: Tensor, later: Tensor) -> Tensor:
    """What T - 1 pairs say of their earlier and of their later frame, (B, T-1, ...) each -> (B, T, ...).

    Frames inside a clip are in two pairs and take the mean.
    """
    inside = (earlier[:, 1:] + later[:, :-1]) / 2
    return torch.cat([earlier[:, :1], inside, later[:, -1:]], 1)


def apart(pooled: Tensor) -> Tensor:
    """Pooled (B, T-1, 2, W) of both frames of each pair -> (): the mean of 1 - cosine."""
    return (1 - F.cosine_similarity(pooled[:, :, 0].float(), pooled[:, :, 1].float(), dim=-1)).mean()


@dataclass(frozen=True, slots=True)
class Aligned:
    """``frames``, ``pairs`` (B, T, 1 + N, W): tokens weighted by masks, and what the features of pairs say; the class

    token is as it was in both. ``pooled`` (B, T-1, 2, W): weighted sums over places. ``points`` (B, T-1, 2, 2): (x, y).
    """

    frames: Tensor
    pairs: Tensor
    pooled: Tensor
    points: Tensor


def _normed(conv: nn.Conv2d) -> list[nn.Module]:
    return [conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU()]


def _pooled(conv: nn.Conv2d) -> list[nn.Module]:
    return [conv, nn.BatchNorm2d(conv.out_channels), nn.MaxPool2d(2), nn.ReLU()]


class Alignment(nn.Module):
    """Projected tokens (B, T, 1 + N, W), T of two or more -> ``Aligned``.

    In training a mask is the mean of nine, around the point and ``offset`` away from it; else it is that of the point.
    All points lie in the middle at first.
    """

    offset: Tensor

    def __init__(self, width: int, *, grid: tuple[int, int], channels: int = 256, offset: float = 0.2) -> None:
        super().__init__()
        self.grid, half = grid, channels // 2
        if min(grid) < 4 or channels % 8:
            raise InputError(
                f"alignment needs 4 x 4 patches or more and channels in eights, got {grid[0]} x {grid[1]} patches and "
                f"{channels} channels"
            )
        double = 2 * width
        self.interaction = nn.Sequential(
            *_normed(nn.Conv2d(double, double, 3, padding=1, groups=double)),
            *_normed(nn.Conv2d(double, channels, 1)),
            *_normed(nn.Conv2d(channels, channels, 3, padding=1)),
        )
        last = nn.Conv2d(channels // 4, 4, 1, groups=2)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        self.prediction = nn.Sequential(
            *_pooled(nn.Conv2d(channels, half, 3, padding=1)),
            *_pooled(nn.Conv2d(half, half, 3, padding=1)),
            nn.AdaptiveMaxPool2d(1),
            nn.Conv2d(half, channels // 4, 1, groups=2),
            nn.ReLU(),
            last,
            nn.Tanh(),
        )
        self.over_frames = nn.Conv2d(half, half, (3, 1), padding=(1, 0))
        self.fc = nn.Linear(half, width)
        self.register_buffer("offset", torch.tensor(offset))
        self.register_buffer("steps", torch.tensor(STEPS, dtype=torch.float32), persistent=False)

    def forward(self, x: Tensor) -> Aligned:
        """See the class."""
        videos, frames, patches = x.shape[0], x.shape[1], x[:, :, 1:]
        if patches.shape[2] != self.grid[0] * self.grid[1]:
            raise InputError(
                f"this tower was aligned for {self.grid[0]} x {self.grid[1]} patches, got {patches.shape[2]}; switch "
                "patch dropout off, or resize positions before the graft"
            )
        maps = patches.transpose(2, 3).unflatten(3, self.grid)  # (B, T, W, h, w)
        seen = self.interaction(torch.cat([maps[:, :-1], maps[:, 1:]], 2).flatten(0, 1))  # (B (T-1), C, h, w)
        points = REACH * self.prediction(seen).flatten(1).unflatten(1, (2, 2)).unflatten(0, (videos, frames - 1))
        around = points[..., None, :]
        if self.training:
            around = around + (self.offset * self.steps).to(points.dtype)
        weights = masks(around, self.grid).mean(-3).flatten(-2)  # (B, T-1, 2, N)
        earlier, later = weights[:, :, 0, :, None], weights[:, :, 1, :, None]  # (B, T-1, N, 1)
        pooled = torch.stack([(earlier * patches[:, :-1]).sum(2), (later * patches[:, 1:]).sum(2)], 2)
        aligned = per_frame(earlier, later) * patches
        halves = seen.unflatten(0, (videos, frames - 1)).flatten(3).chunk(2, dim=2)  # (B, T-1, C/2, N) each
        told = self.over_frames(per_frame(*halves).transpose(1, 2))  # (B, C/2, T, N)
        told = self.fc(told.permute(0, 2, 3, 1))
        cls = x[:, :, :1]
        return Aligned(torch.cat([cls, aligned], 2), torch.cat([cls, told], 2), pooled, points)
