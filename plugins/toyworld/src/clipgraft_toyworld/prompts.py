"""Prompts for a promptable model, made from masks of objects, and its answers to them.

Shapes: B prompts, one per picture; S x S pixels; g tokens per side, 4g mask cells per side; M candidate masks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Masks:
    """Answers to B prompts: `logits` (B, M, 4g, 4g), `overlap` (B, M) as the model predicts it."""

    logits: Tensor
    overlap: Tensor

    def full(self, side: int) -> Tensor:
        """Logits at the picture's size (B, M, S, S)."""
        return F.interpolate(self.logits, size=(side, side), mode="bilinear", align_corners=False)


def random_point(mask: Tensor) -> Tensor:
    """One pixel (B, 2) as (x, y) of each mask (B, S, S), uniformly; of an empty mask, any pixel."""
    weight = mask.flatten(1).float()
    weight = weight + (weight.sum(1, keepdim=True) == 0)
    index = torch.multinomial(weight, 1)[:, 0]
    side = mask.shape[-1]
    return torch.stack([index % side, index // side], 1).float()


def inner_point(mask: Tensor) -> Tensor:
    """The pixel (B, 2) as (x, y) of each mask (B, S, S) that lies farthest from its border; no chance involved."""
    inside, depth = mask[:, None].float(), torch.zeros(mask.shape)
    while inside.any():
        depth = depth + inside[:, 0]
        inside = -F.max_pool2d(-F.pad(inside, (1, 1, 1, 1)), 3, stride=1)
    smooth = F.avg_pool2d(mask[:, None].float(), 9, stride=1, padding=4, count_include_pad=True)[:, 0]
    index = (depth + 0.5 * smooth).flatten(1).argmax(1)
    side = mask.shape[-1]
    return torch.stack([index % side, index // side], 1).float()


def bounding_box(mask: Tensor) -> Tensor:
    """(B, 4) as x0, y0, x1, y1 of each mask (B, S, S), last pixel included."""
    places = torch.arange(mask.shape[-1], dtype=torch.float32)
    columns, rows = mask.any(1), mask.any(2)

    def ends(line: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.where(line, places, torch.inf).min(1).values
        last = torch.where(line, places, -torch.inf).max(1).values
        return first, last

    (left, right), (top, bottom) = ends(columns), ends(rows)
    return torch.stack([left, top, right, bottom], 1)


def answer(
    model: Any,
    embedding: Tensor,
    *,
    points: Tensor | None = None,
    labels: Tensor | None = None,
    boxes: Tensor | None = None,
    masks: Tensor | None = None,
    several: bool = False,
) -> Masks:
    """Masks of one prompt per picture: `embedding` (B, C, g, g), `points` (B, P, 2), `labels` (B, P), `boxes` (B, 4),

    `masks` (B, 1, 4g, 4g) logits. `several` asks for three candidates instead of one. Every prompt has a row of its
    own, because the decoder adds the mask prompt before it repeats pictures over prompts.
    """
    sparse, dense = model.prompt_encoder(
        input_points=None if points is None else points[:, None],
        input_labels=None if labels is None else labels[:, None],
        input_boxes=None if boxes is None else boxes[:, None],
        input_masks=masks,
    )
    places = model.get_image_wide_positional_embeddings().expand(len(embedding), -1, -1, -1)
    logits, overlap = model.mask_decoder(
        image_embeddings=embedding,
        image_positional_embeddings=places,
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=several,
    )
    return Masks(logits=logits[:, 0], overlap=overlap[:, 0])


def intersection_over_union(found: Tensor, truth: Tensor) -> Tensor:
    """(B, ...) of boolean masks (B, ..., S, S); two empty masks agree."""
    both, either = (found & truth).flatten(-2).sum(-1), (found | truth).flatten(-2).sum(-1)
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)
