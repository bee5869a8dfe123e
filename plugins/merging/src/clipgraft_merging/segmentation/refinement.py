"""Two heads together (SAM-CLIP, section 4.3): patches say what and roughly where, prompts make sharp masks of it."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from clipgraft.config.schema import Config
from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft_merging.sam.segmenter import Segmenter, open_segmenter, segmenter_of
from clipgraft_merging.segmentation.vocabulary import Vocabulary


class RefinementConfig(Config):
    """Refine coarse labels with promptable masks."""

    sam: str | None = Field(None, description="a SAM, or a run of sam-clip, whose masks to use; null: the model's own")
    points: int = Field(3, ge=1, le=16, description="point prompts per class, far from each other")
    above: float = Field(0.5, ge=0, lt=1, description="probability that a cell needs for a point, a class for a prompt")
    size: int | None = Field(
        None, gt=0, description="side at which the masks' tower reads pictures [pixels]; null: own"
    )
    sharpness: float = Field(8.0, gt=0, description="largest size of the mask prompt's logits")

    def segmenter(self, encoder: Encoder) -> Segmenter:
        """The promptable model that the settings name."""
        found = segmenter_of(encoder) if self.sam is None else open_segmenter(self.sam, setting="refine.sam")
        if found is None:
            raise InputError(
                f"{encoder.data.origin.uri} has no promptable masks of its own; name a SAM: refine.sam=DIR or a head"
            )
        return found.to(next(encoder.image.parameters()).device)


def spread_points(probability: Tensor, *, above: float, most: int) -> list[tuple[int, int]]:
    """Cells (row, column) of one class's map (h, w) above a probability: the best one, then whichever is farthest.

    Deviation: the paper draws one to three points at random; these are the same every time. Each further one is the
    cell above the threshold with the largest distance to those chosen; none when all others touch a chosen one.
    """
    rows, columns = (probability > above).nonzero(as_tuple=True)
    if not len(rows):
        return []
    chosen = [int(probability[rows, columns].argmax())]
    while len(chosen) < min(most, len(rows)):
        near = [(rows - rows[i]).square() + (columns - columns[i]).square() for i in chosen]
        distance = torch.stack(near).amin(0)
        if int(distance.max()) <= 2:
            break
        chosen.append(int(distance.argmax()))
    return [(int(rows[i]), int(columns[i])) for i in chosen]


def mask_prompt(probability: Tensor, size: tuple[int, int], *, most: float) -> Tensor:
    """Probabilities (P, h, w) -> logits (P, H, W') for the prompt encoder, no larger than ``most``."""
    logits = torch.logit(probability.double().clamp(1e-9, 1 - 1e-9)).float().clamp(-most, most)
    return F.interpolate(logits[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


@torch.no_grad()
def refined(
    segmenter: Segmenter,
    pixels: Tensor,
    scores: Tensor,
    vocabulary: Vocabulary,
    size: tuple[int, int],
    *,
    settings: RefinementConfig,
    coarse: Tensor,
) -> Tensor:
    """One picture (1, 3, R, R) in [0, 1] and its cosines (K, h, w) -> labels (H, W').

    Every class with a cell above the threshold becomes one prompt, its probabilities as a mask and one to three points.
    A pixel gets the class whose mask is most sure there, if any mask covers it. Others keep background where the
    vocabulary has one, or else their ``coarse`` label (H, W').
    """
    probability = vocabulary.probabilities(scores[None])[0]
    first = int(vocabulary.background == "class")  # classes start behind background
    picked = {
        k: spread_points(probability[k], above=settings.above, most=settings.points)
        for k in range(first, len(probability))
    }
    picked = {k: cells for k, cells in picked.items() if cells}
    rest = coarse if vocabulary.background == "none" else torch.zeros_like(coarse)
    if not picked:
        return rest
    features = segmenter.embed(pixels)
    h, w = features.shape[-2:]
    cell = pixels.new_tensor([pixels.shape[-1] / scores.shape[-1], pixels.shape[-2] / scores.shape[-2]])
    points = pixels.new_zeros(1, len(picked), settings.points, 2)
    labels = torch.full((1, len(picked), settings.points), -1, device=pixels.device)
    for row, cells in enumerate(picked.values()):
        at = torch.tensor([(x, y) for y, x in cells], device=pixels.device)
        points[0, row, : len(cells)] = (at + 0.5) * cell - 0.5
        labels[0, row, : len(cells)] = 1
    prompts = mask_prompt(probability[list(picked)], (4 * h, 4 * w), most=settings.sharpness)[None]
    found = segmenter.masks(features, points, labels, mask_prompts=prompts, multimask=False).best()
    logits = F.interpolate(found, size=size, mode="bilinear", align_corners=False)[0]  # (P, H, W')
    best, which = logits.max(0)
    names = torch.tensor([k - first + 1 for k in picked], device=pixels.device)
    return torch.where(best > 0, names[which], rest)
