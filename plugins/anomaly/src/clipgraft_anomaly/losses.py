"""Focal and Dice losses on upsampled, unsmoothed probability maps (AnomalyCLIP, section 3 and official code)."""

from __future__ import annotations

import torch
from torch import Tensor


def focal(probability: Tensor, mask: Tensor, *, gamma: float = 2.0, smooth: float = 1e-5) -> Tensor:
    """Probabilities (B, 2, S, S) of [normal, anomalous], mask (B, S, S) 0/1 -> scalar, the mean over pixels.

    The one-hot target is clamped to [smooth, 1 - smooth] and p_t gets + smooth, as official: at p = .5 it is .17327
    where the formula without them gives ln(2) / 4.
    """
    target = torch.stack([1 - mask, mask], 1).to(probability.dtype).clamp(smooth, 1 - smooth)
    p = (target * probability).sum(1) + smooth
    return (-((1 - p).clamp_min(0) ** gamma) * p.log()).mean()


def dice(probability: Tensor, mask: Tensor, *, smooth: float = 1.0) -> Tensor:
    """Probabilities (B, S, S) of what the mask (B, S, S) marks -> scalar, the mean over pictures.

    1 - (2 <p, y> + 1) / (sum p + sum y + 1) per picture; nothing marked and nothing claimed costs 0.
    """
    p, y = probability.flatten(1), mask.to(probability.dtype).flatten(1)
    share = (2 * (p * y).sum(1) + smooth) / (p.sum(1) + y.sum(1) + smooth)
    return (1 - share).mean()


def map_loss(probability: Tensor, mask: Tensor) -> Tensor:
    """Focal + Dice of damage + Dice of the rest, for one layer (eq. of L_local)."""
    return focal(probability, mask) + dice(probability[:, 1], mask) + dice(probability[:, 0], 1 - mask)
