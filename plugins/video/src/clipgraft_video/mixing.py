"""Mixup and CutMix of clips, with soft targets: one share, or one box, for the whole batch and all frames."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Mixing:
    """``mixup`` and ``cutmix``: alphas of their Beta laws, 0 for never; ``switch``: how often CutMix when both are on.

    Zhang et al. 2018, arXiv 1710.09412; Yun et al. 2019, arXiv 1905.04899.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    switch: float = 0.5

    def __call__(self, clips: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Clips (B, T, 3, S, S) float and targets (B, K) -> mixed with the batch turned around, by torch's own RNG."""
        if not (self.mixup or self.cutmix) or len(clips) < 2:
            return clips, targets
        boxes = bool(self.cutmix) and (not self.mixup or bool(torch.rand(()) < self.switch))
        alpha = self.cutmix if boxes else self.mixup
        share = float(torch.distributions.Beta(alpha, alpha).sample())
        other = clips.flip(0)
        if boxes:
            top, left, h, w = _box(clips.shape[-2], clips.shape[-1], 1 - share)
            clips = clips.clone()
            clips[..., top : top + h, left : left + w] = other[..., top : top + h, left : left + w]
            share = 1 - h * w / (clips.shape[-2] * clips.shape[-1])
        else:
            clips = share * clips + (1 - share) * other
        return clips, share * targets + (1 - share) * targets.flip(0)


def _box(height: int, width: int, area: float) -> tuple[int, int, int, int]:
    """Top, left, height and width of a box of the share ``area`` around a random point, cut at the borders."""
    h, w = round(height * math.sqrt(area)), round(width * math.sqrt(area))
    y, x = int(torch.randint(height, ())), int(torch.randint(width, ()))
    top, left = max(y - h // 2, 0), max(x - w // 2, 0)
    return top, left, min(y + (h + 1) // 2, height) - top, min(x + (w + 1) // 2, width) - left


def targets_of(labels: Tensor, classes: int, *, smoothing: float = 0.0) -> Tensor:
    """(B,) -> (B, K) that sum to 1: 1 - smoothing + smoothing / K on the label, smoothing / K elsewhere."""
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """(B, K), (B, K) -> ()."""
    return -(targets * logits.float().log_softmax(-1)).sum(-1).mean()
