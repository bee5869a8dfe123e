"""From patch embeddings and two text embeddings to a score map (AnomalyCLIP, official code; section numbers as there).

The order matters and is AnomalyCLIP's: probabilities per patch, then upsampled, summed over layers, then smoothed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

TAU = 0.07
"""The constant temperature of the papers; CLIP's own logit scale isn't used."""


def probabilities(features: Tensor, texts: Tensor, *, tau: float = TAU) -> Tensor:
    """Features (B, N, D) or (B, D) and texts (2, D) or (B, 2, D) [normal, anomalous] -> softmax (B, N, 2) or (B, 2)."""
    x, t = F.normalize(features.float(), dim=-1), F.normalize(texts.float(), dim=-1)
    if t.ndim == 2:
        return (x @ t.T / tau).softmax(-1)
    return (torch.einsum("b...d,bkd->b...k", x, t) / tau).softmax(-1)


def upsampled(share: Tensor, grid: tuple[int, int], size: int | tuple[int, int]) -> Tensor:
    """(B, N, C) on ``grid`` -> (B, C, S, S), bilinear without aligned corners."""
    square = share.transpose(1, 2).reshape(share.shape[0], -1, *grid)
    return F.interpolate(square, size, mode="bilinear", align_corners=False)


def gaussian(maps: Tensor, sigma: float) -> Tensor:
    """(B, S, S) smoothed as scipy's ``gaussian_filter`` does by default: cut at 4 sigma, edges mirrored."""
    if sigma <= 0:
        return maps
    radius = int(4 * sigma + 0.5)
    x = torch.arange(-radius, radius + 1, device=maps.device, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (x / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(maps.dtype)
    for axis in (1, 2):
        maps = _along(maps.transpose(1, axis), kernel).transpose(1, axis)
    return maps


def _along(maps: Tensor, kernel: Tensor) -> Tensor:
    """Convolve the rows' axis (1) of (B, H, W') with symmetric edges."""
    size, radius = maps.shape[1], len(kernel) // 2
    at = torch.arange(-radius, size + radius, device=maps.device) % (2 * size)
    at = torch.where(at < size, at, 2 * size - 1 - at)  # ... 1 0 | 0 1 ... n-1 | n-1 n-2 ...
    wide = maps[:, at].permute(0, 2, 1)  # (B, W', H + 2 radius)
    flat = wide.reshape(-1, 1, wide.shape[-1])
    return F.conv1d(flat, kernel[None, None]).reshape(maps.shape[0], maps.shape[2], size).permute(0, 2, 1)


def fused(maps: Sequence[Tensor], *, mean: bool) -> Tensor:
    """Maps of several layers, each (B, S, S): their sum, as official, or their mean."""
    stacked = torch.stack(list(maps))
    return stacked.mean(0) if mean else stacked.sum(0)
