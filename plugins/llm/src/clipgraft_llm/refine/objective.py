"""CLIP-Refine's two losses, on embeddings that are not normalised and without a logit scale (Yamaguchi et al.,

Post-pre-training for Modality Alignment in Vision-Language Foundation Models, CVPR 2025, arXiv 2504.12717).
G rows of the global batch, D joint space, T temperature.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from clipgraft.config.schema import Config
from clipgraft.distributed import gather_with_grad
from clipgraft.losses.base import Loss, LossInputs
from clipgraft_llm.named_losses import needed

Reduction = Literal["mse", "paper"]


def rafa(image: Tensor, text: Tensor, reference: Tensor, *, reduction: Reduction = "mse") -> Tensor:
    """Random feature alignment: pull both (G, D) to one ``reference`` (G, D) ~ N(0, I) per pair.

    ``mse`` is the code's form, the mean over rows and dimensions of both distances; ``paper`` halves their sum over
    dimensions, which is D / 2 times as much.
    """
    distance = (image - reference).square() + (text - reference).square()
    return distance.mean() if reduction == "mse" else distance.sum(-1).mean() / 2


def softened(teacher: Tensor, *, alpha: float) -> Tensor:
    """Teacher probabilities (G, G) -> targets alpha I + (1 - alpha) q, whose rows sum to one."""
    return alpha * torch.eye(len(teacher), dtype=teacher.dtype, device=teacher.device) + (1 - alpha) * teacher


def hycd(
    image: Tensor, text: Tensor, teacher_image: Tensor, teacher_text: Tensor, *, alpha: float = 0.5, T: float = 1.0
) -> dict[str, Tensor]:
    """Hybrid contrastive distillation of (G, D) and the teacher's (G, D'): T^2 KL to the softened target.

    alpha 1 is cross-entropy with the right pairs, alpha 0 plain self-distillation.
    """
    own, held = image @ text.T / T, teacher_image @ teacher_text.T / T  # (G, G)

    def one_way(logits: Tensor, target_logits: Tensor) -> Tensor:
        target = softened(target_logits.softmax(1), alpha=alpha)
        # xlogy: a target of 0 takes no part (0 log 0)
        return (torch.xlogy(target, target) - target * logits.log_softmax(1)).sum(1).mean() * T**2

    rows, columns = one_way(own, held), one_way(own.T, held.T)
    return {"loss": (rows + columns) / 2, "image_to_text": rows, "text_to_image": columns}


class RafaConfig(Config):
    """Settings of ``llm/rafa``."""

    reduction: Reduction = Field("mse", description="mse as in the code, paper is D/2 times as much")


class HycdConfig(Config):
    """Settings of ``llm/hycd``."""

    alpha: float = Field(0.5, ge=0, le=1, description="share of the right pair in the target")
    temperature: float = Field(1.0, gt=0, description="of the similarities of embeddings that are not normalised")
    unit: bool = Field(
        False, description="another loss than the paper's: cosines times the logit scale instead of raw similarities"
    )


class RafaLoss(Loss):
    """Mean over this rank's rows; the stage draws the references."""

    def __init__(self, *, reduction: Reduction = "mse") -> None:
        super().__init__()
        self.reduced: Reduction = reduction

    def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        """The loss alone."""
        reference = needed(inputs, "reference")
        return {"loss": rafa(inputs.need("image"), inputs.need("text"), reference, reduction=self.reduced)}


class HycdLoss(Loss):
    """The global batch of raw embeddings, or of cosines with the model's own scale."""

    batch_coupled = True
    reduction = "global"

    def __init__(self, *, alpha: float = 0.5, temperature: float = 1.0, unit: bool = False) -> None:
        super().__init__()
        self.alpha, self.temperature, self.unit, self.needs_scale = alpha, temperature, unit, unit

    def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Both directions, and each."""
        names = ("image", "text", "teacher_image", "teacher_text")
        image, text, held_image, held_text = (gather_with_grad(inputs.need(name)) for name in names)
        if self.unit:
            image, text, held_image, held_text = (F.normalize(x, dim=-1) for x in (image, text, held_image, held_text))
            scale = inputs.need("logit_scale")
            image, held_image = scale * image, scale.detach() * held_image
        return hycd(image, text, held_image, held_text, alpha=self.alpha, T=self.temperature)
