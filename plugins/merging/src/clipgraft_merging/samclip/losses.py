"""SAM-CLIP's objectives, pure: cosine distance to CLIP's embeddings, and masks that agree with the SAM teacher's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clipgraft.types import widened

MaskKind = Literal["soft", "quality-focal", "hard"]
Match = Literal["min", "each"]
IouTarget = Literal["teacher", "measured"]


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """(B, D) and (B, D) -> (): mean of 1 - cos, in [0, 2]; scales of either side don't matter."""
    return 1 - F.cosine_similarity(widened(student), widened(teacher.detach()), dim=-1).mean()


@dataclass(frozen=True, slots=True)
class MaskTerms:
    """Scalars: ``focal`` and ``dice`` of matched masks, ``iou`` of the guessed IoUs; ``total``: their weighted sum."""

    total: Tensor
    focal: Tensor
    dice: Tensor
    iou: Tensor


def pixel_terms(logits: Tensor, target: Tensor, *, kind: MaskKind) -> tuple[Tensor, Tensor]:
    """Logits (..., h, w) of the student and of the teacher -> focal (...) and dice (...) per mask.

    ``soft``: cross-entropy with the teacher's probabilities less their entropy; ``quality-focal``: the same weighted by
    |t - p|^2 (Li et al. 2020, arXiv 2006.04388). Both, and dice with squared sums below, are least and have no gradient
    where the student equals the teacher. Focal loss and plain dice with soft targets have one there, so a perfect
    student would leave its teacher. ``hard``: SAM's focal (alpha .25, gamma 2) and dice on the teacher's mask.
    Deviation: the paper doesn't say which.
    """
    s, z = widened(logits), widened(target.detach())
    p, t = s.sigmoid(), z.sigmoid()
    if kind == "hard":
        t = (z > 0).to(s.dtype)
        entropy = F.binary_cross_entropy_with_logits(s, t, reduction="none")
        right, balance = p * t + (1 - p) * (1 - t), 0.25 * t + 0.75 * (1 - t)
        focal = (balance * (1 - right) ** 2 * entropy).flatten(-2).mean(-1)
        return focal, 1 - (2 * (p * t).flatten(-2).sum(-1) + 1) / ((p + t).flatten(-2).sum(-1) + 1)
    entropy = F.binary_cross_entropy_with_logits(s, t, reduction="none")
    entropy = entropy - F.binary_cross_entropy_with_logits(z, t, reduction="none")
    if kind == "quality-focal":
        entropy = (t - p) ** 2 * entropy
    both, either = (p * t).flatten(-2).sum(-1), (p * p + t * t).flatten(-2).sum(-1)
    return entropy.flatten(-2).mean(-1), 1 - (2 * both + 1) / (either + 1)


def measured_iou(logits: Tensor, target: Tensor) -> Tensor:
    """Masks (..., h, w) of logits above zero -> (...) IoU; two empty masks agree."""
    a, b = logits > 0, target > 0
    both, either = (a & b).flatten(-2).sum(-1), (a | b).flatten(-2).sum(-1)
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def mask_loss(
    logits: Tensor,
    iou: Tensor,
    *,
    teacher_logits: Tensor,
    teacher_iou: Tensor,
    kind: MaskKind = "soft",
    match: Match = "min",
    iou_target: IouTarget = "teacher",
    focal: float = 20.0,
    dice: float = 1.0,
    iou_weight: float = 1.0,
) -> MaskTerms:
    """Student's masks (R, M, h, w) with guessed IoUs (R, M), and the teacher's for the same prompts -> terms.

    ``match`` min: the teacher's best mask is the target, and of the student's the one nearest to it learns (SAM's rule
    for ambiguous prompts); each: every mask has the teacher's of the same place as its target. ``iou_target``: guesses
    follow the teacher's guesses, or the IoU with the target.
    """
    teacher_logits, teacher_iou = teacher_logits.detach(), teacher_iou.detach()
    target = teacher_logits
    if match == "min":
        best = teacher_iou.argmax(-1)[:, None, None, None].expand(-1, 1, *teacher_logits.shape[-2:])
        target = teacher_logits.gather(1, best).expand_as(logits)
    focal_of, dice_of = pixel_terms(logits, target, kind=kind)  # (R, M)
    if match == "min":
        nearest = (focal * focal_of + dice * dice_of).detach().argmin(-1, keepdim=True)
        focal_of, dice_of = focal_of.gather(1, nearest), dice_of.gather(1, nearest)
    wanted = widened(teacher_iou) if iou_target == "teacher" else measured_iou(logits.detach(), target)
    terms = focal_of.mean(), dice_of.mean(), F.mse_loss(widened(iou), wanted)
    return MaskTerms(focal * terms[0] + dice * terms[1] + iou_weight * terms[2], *terms)
