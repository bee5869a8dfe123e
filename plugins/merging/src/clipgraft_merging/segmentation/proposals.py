"""Every object of a picture: a SAM asked at a grid of points, its answers sorted by how sure and stable they are.

After SAM's automatic mask generation (Kirillov et al. 2023, appendix B), on one scale: no crops of the picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from clipgraft.config.schema import Config
from clipgraft_merging.sam.segmenter import Segmenter
from clipgraft_merging.segmentation.prompts import pairwise_iou

POINTS = 64
"""Prompts that the decoder answers at a time."""


@dataclass(frozen=True, slots=True)
class Proposals:
    """``masks`` (P, H, W') bool and ``quality`` (P,) as the decoder guesses it, best first."""

    masks: Tensor
    quality: Tensor


class ProposalConfig(Config):
    """Which masks are kept."""

    grid: int = Field(8, ge=1, le=64, description="points per side that are asked")
    quality: float = Field(0.7, ge=0, le=1, description="IoU that the decoder must guess for a mask to stay")
    stability: float = Field(0.8, ge=0, le=1, description="IoU between the mask cut above and below its border")
    offset: float = Field(1.0, gt=0, description="how far above and below, in logits")
    overlap: float = Field(0.7, ge=0, le=1, description="of two masks with a larger IoU the better one stays")
    smallest: float = Field(0.002, ge=0, le=1, description="share of the picture that a mask must cover")
    largest: float = Field(0.6, gt=0, le=1, description="share of the picture that a mask may cover")


@torch.no_grad()
def proposals(segmenter: Segmenter, pixels: Tensor, size: tuple[int, int], settings: ProposalConfig) -> Proposals:
    """One picture (1, 3, R, R') in [0, 1] -> masks at (H, W')."""
    features = segmenter.embed(pixels)
    line = (torch.arange(settings.grid, device=pixels.device) + 0.5) / settings.grid
    y, x = torch.meshgrid(line * pixels.shape[-2], line * pixels.shape[-1], indexing="ij")
    points = torch.stack([x, y], -1).view(1, -1, 1, 2) - 0.5
    logits, guesses = [], []
    for part in points.split(POINTS, 1):
        found = segmenter.masks(features, part, torch.ones(part.shape[:3], device=part.device).long())
        logits.append(found.logits[0].flatten(0, 1))
        guesses.append(found.iou[0].flatten())
    score, guess = torch.cat(logits), torch.cat(guesses).clamp(0, 1)
    keep = (guess >= settings.quality) & (_stability(score, settings.offset) >= settings.stability)
    score, guess = score[keep], guess[keep]
    if not len(guess):
        return Proposals(torch.zeros(0, *size, dtype=torch.bool, device=pixels.device), guess)
    order = guess.argsort(descending=True, stable=True)
    masks = F.interpolate(score[order][None], size=size, mode="bilinear", align_corners=False)[0] > 0
    guess, share = guess[order], masks.flatten(1).float().mean(1)
    keep = (share >= settings.smallest) & (share <= settings.largest)
    masks, guess = masks[keep], guess[keep]
    rows = distinct(masks, overlap=settings.overlap)
    return Proposals(masks[rows], guess[rows])


def _stability(logits: Tensor, offset: float) -> Tensor:
    """(P, h, w) -> (P,): IoU of the mask cut at +offset and at -offset, the first inside the second."""
    inner, outer = (logits > offset).flatten(1).sum(1), (logits > -offset).flatten(1).sum(1)
    return inner / outer.clamp(min=1)


def distinct(masks: Tensor, *, overlap: float) -> Tensor:
    """Rows of (P, H, W'), best first, that stay when each removes the later ones it overlaps too much."""
    if not len(masks):
        return torch.zeros(0, dtype=torch.long, device=masks.device)
    iou, kept = pairwise_iou(masks), list[int]()
    for row in range(len(masks)):
        if not kept or float(iou[row, kept].max()) <= overlap:
            kept.append(row)
    return torch.tensor(kept, device=masks.device)
