"""Patch tokens of two towers as one sequence (MoF) and levels of one tower as one map (COMM).

B images, N patch tokens, W width (Wa and Wb where towers differ), D output width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft.errors import InputError

Mode = Literal["add", "interleave", "concat"]
Normalise = Literal["softmax", "none"]


class FeatureFusion(nn.Module):
    """Tokens of two towers over one grid, (B, N, Wa) and (B, N, Wb), as one tensor.

    ``add``: share * a + (1 - share) * b (additive MoF, Tong et al. 2024, section 4). ``interleave``: a's and b's token
    of each place in turn, (B, 2N, D) (interleaved MoF). ``concat``: along channels, (B, N, Wa + Wb). ``width`` puts a
    linear map to that width before it, one per tower. ``norm``: a LayerNorm without weights per tower first, so that
    neither outweighs the other by its scale.
    """

    def __init__(
        self,
        widths: tuple[int, int],
        *,
        mode: Mode = "interleave",
        share: float = 0.5,
        norm: bool = False,
        width: int | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= share <= 1:
            raise InputError(f"share is {share}; the first tower's share lies between 0 and 1")
        if width is None and mode != "concat" and widths[0] != widths[1]:
            raise InputError(
                f"mode {mode} needs tokens of one width, these towers have {widths[0]} and {widths[1]}; set mode to "
                "concat, or width to project both"
            )
        self.mode, self.share, self.norm = mode, share, norm
        self.projections = nn.ModuleList(nn.Identity() if width is None else nn.Linear(w, width) for w in widths)
        sizes = widths if width is None else (width, width)
        self.width = sum(sizes) if mode == "concat" else sizes[0]

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """(B, N, Wa), (B, N, Wb) -> (B, N, D), or (B, 2N, D) interleaved."""
        if first.shape[:2] != second.shape[:2]:
            raise InputError(
                f"tokens of {tuple(first.shape[:2])} and {tuple(second.shape[:2])}; resize to one grid first"
            )
        if self.norm:
            first, second = (F.layer_norm(x, x.shape[-1:]) for x in (first, second))
        first, second = (p(x) for p, x in zip(self.projections, (first, second), strict=True))
        if self.mode == "add":
            return self.share * first + (1 - self.share) * second
        if self.mode == "interleave":
            return torch.stack([first, second], dim=2).flatten(1, 2)
        return torch.cat([first, second], dim=-1)

    def grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """(h, w) of the towers -> that of the result: interleaved rows are twice as long."""
        return (grid[0], 2 * grid[1]) if self.mode == "interleave" else grid


def separate(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 2N, D) interleaved -> the first and the second tower's (B, N, D)."""
    return tokens[:, 0::2], tokens[:, 1::2]


def resized(tokens: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """(B, h*w, W) row-major -> (B, h'*w', W), bilinear; unchanged on the same grid."""
    if grid == to:
        return tokens
    x = tokens.transpose(1, 2).unflatten(2, grid)
    return F.interpolate(x, to, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)


class MultiLevelMerge(nn.Module):
    """sum_i a_i Linear(LN(x_i)) over blocks i of one tower (COMM, Jiang et al. 2023).

    ``softmax``: a is positive and sums to one, equal at first. ``none``: a is free, equal shares at first. ``linear``
    False leaves out the maps and the norms' weights: nothing to train but a. Layers are folded in one by one.
    """

    def __init__(
        self, layers: Sequence[int], width: int, *, normalise: Normalise = "softmax", linear: bool = True
    ) -> None:
        super().__init__()
        if not layers or len(set(layers)) < len(layers):
            raise InputError(f"layers {list(layers)} must name one block or more, each once")
        self.layers, self.normalise = tuple(layers), normalise
        start = 0.0 if normalise == "softmax" else 1 / len(layers)
        self.scale = nn.Parameter(torch.full((len(layers),), start))
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=linear) for _ in layers)
        self.maps = nn.ModuleList(nn.Linear(width, width) if linear else nn.Identity() for _ in layers)

    @property
    def weights(self) -> Tensor:
        """(layers,) a."""
        return self.scale.softmax(0) if self.normalise == "softmax" else self.scale

    def forward(self, features: Mapping[int, Tensor]) -> Tensor:
        """{block: (B, N, W)} -> (B, N, W)."""
        if missing := [i for i in self.layers if i not in features]:
            raise InputError(f"block {missing[0]} was not given; ask for FeatureRequest(layers={self.layers})")
        total: Tensor | None = None
        for weight, norm, linear, layer in zip(self.weights, self.norms, self.maps, self.layers, strict=True):
            part = weight * linear(norm(features[layer]))
            total = part if total is None else total + part
        assert total is not None
        return total
