"""Prompts for the mask stream: points in masks and boxes around them, and masks when the data has none."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from clipgraft_merging.sam.promptable import Promptable


@dataclass(frozen=True, slots=True)
class Prompts:
    """``points`` (B, P, 1, 2) x, y [pixels], ``labels`` (B, P, 1) all on the object; ``boxes`` (B, P', 4) [pixels]."""

    points: Tensor
    labels: Tensor
    boxes: Tensor


def sample_prompts(
    masks: Tensor, *, size: tuple[int, int], points: int, boxes: int, noise: float = 0.1, most: float = 20.0
) -> Prompts:
    """Masks (B, K, h, w), positive inside, over a whole image of ``size`` (H, W') [pixels] -> random prompts.

    Each prompt draws one of the masks that aren't empty, with replacement, then a point anywhere in it, or its box with
    Gaussian noise of ``noise`` of its sides, ``most`` pixels at most (as SAM was trained). An image without masks gets
    points anywhere and its whole as the box. Draws from the global random state of the masks' device.
    """
    inside = (masks > 0).to(torch.float32)
    b, _, h, w = inside.shape
    height, width = size
    full = inside.flatten(2).amax(-1)
    full = torch.where(full.sum(1, keepdim=True) > 0, full, 1.0)
    which = torch.multinomial(full, points + boxes, replacement=True)
    chosen = inside.gather(1, which[..., None, None].expand(-1, -1, h, w))
    chosen = torch.where(chosen.flatten(2).amax(-1)[..., None, None] > 0, chosen, 1.0)
    at = chosen[:, :points].reshape(-1, h * w)
    cell = torch.multinomial(at, 1).reshape(b, points, 1) if points else which.new_zeros(b, 0, 1)
    place = torch.stack([cell % w, cell // w], -1) + torch.rand(b, points, 1, 2, device=masks.device)
    scale = place.new_tensor([width / w, height / h])
    return Prompts(
        points=place * scale - 0.5,
        labels=torch.ones(b, points, 1, dtype=torch.long, device=masks.device),
        boxes=_jittered(_boxes(chosen[:, points:]) * scale.repeat(2) - 0.5, size=size, noise=noise, most=most),
    )


def _boxes(masks: Tensor) -> Tensor:
    """(B, P, h, w), none empty -> (B, P, 4) x0, y0, x1, y1 in cells, the last cell included."""
    sides = []
    for filled in (masks.amax(-2) > 0, masks.amax(-1) > 0):  # columns, then rows
        length = filled.shape[-1]
        at = torch.arange(length, device=masks.device)
        first = torch.where(filled, at, length).amin(-1)
        sides.append((first, torch.where(filled, at, -1).amax(-1) + 1))
    (x0, x1), (y0, y1) = sides
    return torch.stack([x0, y0, x1, y1], -1).to(masks.dtype)


def _jittered(boxes: Tensor, *, size: tuple[int, int], noise: float, most: float) -> Tensor:
    sides = (boxes[..., 2:] - boxes[..., :2]).repeat(1, 1, 2)
    moved = boxes + (torch.randn_like(boxes) * noise * sides).clamp(-most, most)
    limit = boxes.new_tensor([size[1], size[0], size[1], size[0]]) - 0.5
    moved = moved.clamp(min=-0.5).minimum(limit)
    low, high = torch.minimum(moved[..., :2], moved[..., 2:]), torch.maximum(moved[..., :2], moved[..., 2:])
    return torch.cat([low, high], -1)


@torch.no_grad()
def automatic_masks(
    promptable: Promptable,
    features: Tensor,
    *,
    side: int = 8,
    keep: int = 16,
    iou: float = 0.7,
    overlap: float = 0.7,
    area: tuple[float, float] = (0.001, 0.95),
) -> Tensor:
    """Neck features (B, C, h, w) -> (B, keep, 4h, 4w) bool: what the model finds by itself, empty where it finds less.

    A grid of ``side`` x ``side`` points; of each the mask with the highest guessed IoU, if that reaches ``iou`` and the
    mask covers a share of the image within ``area``; of two that overlap by more than ``overlap`` the better one.
    """
    b, _, h, w = features.shape
    line = (torch.arange(side, device=features.device, dtype=features.dtype) + 0.5) / side
    x, y = line.repeat(side) * w * promptable.patch - 0.5, line.repeat_interleave(side) * h * promptable.patch - 0.5
    grid = torch.stack([x, y], -1)[None, :, None].expand(b, -1, -1, -1)
    ones = torch.ones(b, 1, 1, dtype=torch.long, device=features.device)
    masks, scores = [], []
    for part in grid.split(max(1, 1024 // side**2) * side, dim=1):
        found = promptable.masks(features, part, ones.expand(-1, part.shape[1], -1))
        masks.append(found.best() > 0)
        scores.append(found.iou.amax(-1))
    mask, score = torch.cat(masks, 1), torch.cat(scores, 1)
    flat = mask.flatten(2).to(features.dtype)
    share = flat.mean(-1)
    score = torch.where((score >= iou) & (share >= area[0]) & (share <= area[1]), score, 0.0)
    both = flat @ flat.transpose(1, 2)
    size = flat.sum(-1)
    ious = both / (size[:, :, None] + size[:, None] - both).clamp(min=1)
    kept = []
    for _ in range(min(keep, side**2)):
        best = score.argmax(1)
        row = torch.arange(b, device=score.device)
        kept.append(mask[row, best] & (score[row, best] > 0)[:, None, None])
        score = torch.where(ious[row, best] > overlap, 0.0, score)
        score = score.scatter(1, best[:, None], 0.0)
    return F.pad(torch.stack(kept, 1), (0, 0, 0, 0, 0, max(0, keep - len(kept))))
