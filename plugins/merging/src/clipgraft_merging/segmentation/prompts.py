"""Prompts made from masks: the box around an object, and points on it, without chance."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def boxes_of(masks: Tensor) -> Tensor:
    """Masks (P, H, W') bool, none empty -> (P, 4) x0, y0, x1, y1 [pixels], the last pixel included."""
    found = []
    for line in (masks.any(1), masks.any(2)):  # columns, rows
        places = torch.arange(line.shape[1], device=masks.device, dtype=torch.float32)
        found.append(torch.where(line, places, torch.inf).amin(1))
        found.append(torch.where(line, places, -torch.inf).amax(1))
    left, right, top, bottom = found
    return torch.stack([left, top, right, bottom], 1)


def inner_points(masks: Tensor) -> Tensor:
    """Masks (P, H, W') bool, none empty -> (P, 2) x, y [pixels] of the pixel farthest from outside.

    Distance is in steps of eight directions; among equals the one with most of the mask around it wins.
    """
    inside, depth = masks[:, None].float(), torch.zeros(masks.shape, device=masks.device)
    while inside.any():
        depth += inside[:, 0]
        inside = -F.max_pool2d(-F.pad(inside, (1, 1, 1, 1)), 3, stride=1)  # erosion; what lies outside is no mask
    around = F.avg_pool2d(masks[:, None].float(), 9, stride=1, padding=4)[:, 0]
    index = (depth + 0.5 * around).masked_fill(~masks, -1).flatten(1).argmax(1)
    width = masks.shape[-1]
    return torch.stack([index % width, index // width], 1).float()


def mask_iou(found: Tensor, truth: Tensor) -> Tensor:
    """(..., H, W') bool twice -> (...) float; two empty masks agree."""
    both, either = (found & truth).flatten(-2).sum(-1), (found | truth).flatten(-2).sum(-1)
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def pairwise_iou(masks: Tensor) -> Tensor:
    """(P, H, W') bool -> (P, P) float."""
    flat = masks.flatten(1).float()
    both = flat @ flat.T
    area = flat.sum(1)
    return both / (area[:, None] + area[None] - both).clamp(min=1)
