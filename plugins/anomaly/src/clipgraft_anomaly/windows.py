"""What a ViT says about every window of k x k patches, and scores of windows spread over the patches they cover.

B images, grid (h, w), N = h * w patches, M = (h - k + 1) * (w - k + 1) windows, W tower width, D joint embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from clipgraft.errors import InputError
from clipgraft_anomaly.dense import DenseTower

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Views:
    """``whole`` (B, D) of pictures and ``windows`` {k: (B, M, D)}, projected; ``patches`` (B, N, W) behind the last

    norm, not projected. fp32, not normalised.
    """

    whole: Tensor
    windows: Mapping[int, Tensor]
    patches: Tensor


def window_patches(grid: tuple[int, int], k: int) -> Tensor:
    """(M, k * k) int64: the patches that every window covers, row-major like the windows themselves."""
    if not 1 <= k <= min(grid):
        raise InputError(
            f"a window of {k} x {k} patches doesn't fit a grid of {grid[0]} x {grid[1]}; use scales of 1 to {min(grid)}"
        )
    at = torch.arange(grid[0] * grid[1]).view(grid)
    return at.unfold(0, k, 1).unfold(1, k, 1).reshape(-1, k * k)


def spread(scores: Tensor, grid: tuple[int, int], k: int) -> Tensor:
    """Scores (B, M) >= 0 of windows -> (B, h, w): the harmonic mean over the windows that cover a patch (eq. 3).

    A score of zero makes its patches zero. Sums over covering windows are those of a k x k box.
    """
    inverse = (1 / scores).view(len(scores), 1, grid[0] - k + 1, grid[1] - k + 1)
    return (_boxed(torch.ones_like(inverse[:1]), k) / _boxed(inverse, k))[:, 0]


def _boxed(x: Tensor, k: int) -> Tensor:
    """(B, 1, h - k + 1, w - k + 1) -> (B, 1, h, w), sums over the windows that cover a patch."""
    return F.avg_pool2d(F.pad(x, (k - 1,) * 4), k, stride=1) * k * k


def harmonic(maps: Sequence[Tensor]) -> Tensor:
    """Harmonic mean of maps of one shape."""
    stacked = torch.stack(list(maps))
    return len(stacked) / (1 / stacked).sum(0)


class WindowTower(nn.Module):
    """Runs a tower over pictures and over every window of theirs.

    A window is its own short sequence, the class token and its patches, taken where positions were added already: what
    lies outside is dropped, not blanked. Sequences never attend to each other; ``chunk`` of them run at a time, which
    bounds memory.
    """

    def __init__(
        self, dense: DenseTower, *, scales: Sequence[int], chunk: int = 2048, precision: Precision = "fp32"
    ) -> None:
        super().__init__()
        self.dense, self.scales, self.chunk, self.precision = dense, tuple(scales), chunk, precision
        for k in self.scales:
            self.register_buffer(f"patches_{k}", window_patches(dense.grid, k), persistent=False)

    def forward(self, pixels: Tensor) -> Views:
        """Standardised pixels (B, 3, S, S) -> features of pictures, windows and patches."""
        dense = self.dense
        if tuple(pixels.shape[-2:]) != (dense.size, dense.size):
            raise InputError(
                f"got pixels of {tuple(pixels.shape[-2:])}, this detector takes {dense.size} x {dense.size}"
            )
        with parametrize.cached(), self._autocast(pixels.device):
            embedded = dense.embed(pixels)
            last = self._blocks(embedded)
            whole, patches = dense.project(last[:, 0]), dense.tower.ln_post(last[:, 1:])
            windows = {k: self._windows(embedded, getattr(self, f"patches_{k}")) for k in self.scales}
        return Views(whole.float(), {k: found.float() for k, found in windows.items()}, patches.float())

    def _windows(self, embedded: Tensor, patches: Tensor) -> Tensor:
        """Embedded tokens (B, 1 + N, W) and windows (M, k * k) -> (B, M, D)."""
        taken = torch.cat([patches.new_zeros(len(patches), 1), patches + 1], 1)  # the class token first
        found = []
        for picture in torch.split(embedded, max(1, self.chunk // len(taken))):
            for some in torch.split(taken, self.chunk):
                sequences = picture[:, some].flatten(0, 1)  # (b * m, 1 + k * k, W)
                found.append(self.dense.project(self._blocks(sequences)[:, 0]).view(len(picture), len(some), -1))
        parts = -(-len(taken) // self.chunk)
        return torch.cat([torch.cat(found[i : i + parts], 1) for i in range(0, len(found), parts)])

    def _blocks(self, x: Tensor) -> Tensor:
        """The tower's blocks over (B', L, W), batch first whatever the container's own habit is."""
        for block in self.dense.tower.transformer.resblocks:
            x = block(x)
        return x

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, DTYPES.get(self.precision), enabled=self.precision != "fp32")
