"""Reinforced training: several stored teachers, one target (Vasu et al., MobileCLIP, CVPR 2024, arXiv 2311.17049,

section 3; Faghri et al., MobileCLIP2, arXiv 2508.20691). G rows of the global batch; teacher t has width S_t, and the
teachers stand side by side in (G, S), S their sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from clipgraft.config.schema import Config
from clipgraft.errors import ClipgraftError
from clipgraft.losses.base import Loss, LossInputs, gathered_unit
from clipgraft_llm.named_losses import needed


def parts(x: Tensor, dims: Sequence[int]) -> list[Tensor]:
    """(G, S) -> one unit (G, S_t) per teacher; bf16 storage leaves lengths a little off one."""
    if x.shape[1] != sum(dims):
        raise ClipgraftError(f"the store holds {x.shape[1]} teacher dimensions, the loss is told {list(dims)}")
    return [F.normalize(part, dim=-1) for part in x.split(list(dims), 1)]


def ensemble_target(images: Sequence[Tensor], texts: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """Unit (G, S_t) of each teacher -> (G, G): the mean of the teachers' softmaxes, taken after each softmax."""
    each = [(s * x @ y.T).softmax(1) for x, y, s in zip(images, texts, scales, strict=True)]
    return torch.stack(each).mean(0)


def distillation(
    image: Tensor,
    text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    *,
    scale: Tensor | float,
    dims: Sequence[int],
    scales: Sequence[float],
) -> Tensor:
    """Unit (G, D) and stored (G, S) -> cross-entropy of the student to the ensemble's target, both ways, halved."""
    logits = scale * image @ text.T
    images, texts = parts(teacher_image, dims), parts(teacher_text, dims)
    rows = -(ensemble_target(images, texts, scales).detach() * logits.log_softmax(1)).sum(1).mean()
    columns = -(ensemble_target(texts, images, scales).detach() * logits.T.log_softmax(1)).sum(1).mean()
    return (rows + columns) / 2


def contrastive(image: Tensor, text: Tensor, *, scale: Tensor | float) -> Tensor:
    """CLIP's loss of unit (G, D)."""
    logits, own = scale * image @ text.T, torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


class ReinforcedConfig(Config):
    """Settings of ``llm/reinforced``."""

    dims: tuple[int, ...] = Field((), description="width of each stored teacher; the recipe fills it in [dimensions]")
    scales: tuple[float, ...] = Field((), description="of each teacher's cosines; empty takes those of the store")
    contrast: float = Field(0.0, ge=0, description="weight of CLIP's own loss")
    distill: float = Field(1.0, ge=0, description="weight of the stored teachers")

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.contrast and not self.distill:
            raise ValueError("contrast and distill are both 0; give one of them a weight")
        if self.dims and self.scales and len(self.dims) != len(self.scales):
            raise ValueError(f"{len(self.scales)} scales for {len(self.dims)} teachers; give one per teacher")
        return self


class ReinforcedLoss(Loss):
    """Sum over two pairings, picture with its caption and with a written one: contrast x CLIP + distill x teachers."""

    batch_coupled = True
    reduction = "global"
    needs_scale = True

    def __init__(
        self,
        *,
        dims: Sequence[int] = (),
        scales: Sequence[float] = (),
        contrast: float = 0.0,
        distill: float = 1.0,
    ) -> None:
        super().__init__()
        self.dims, self.scales, self.contrast, self.distill = tuple(dims), tuple(scales), contrast, distill

    def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        """``contrastive`` and ``distill`` are weighted sums over both pairings."""
        if len(self.dims) != len(self.scales) or not self.dims:
            raise ClipgraftError("llm/reinforced needs dims and scales, one each per teacher; run llm/reinforce")
        scale, found = inputs.need("logit_scale"), {"contrastive": [], "distill": []}
        image, teacher_image = gathered_unit(inputs.need("image")), _gathered(inputs.need("teacher_image"))
        pairings = [("text", inputs.need("text"), inputs.need("teacher_text"))]
        if getattr(inputs, "synthetic", None) is not None:
            pairings.append(("synthetic", needed(inputs, "synthetic"), needed(inputs, "teacher_synthetic")))
        for _, text, teacher_text in pairings:
            text, teacher_text = gathered_unit(text), _gathered(teacher_text)
            found["contrastive"].append(contrastive(image, text, scale=scale))
            found["distill"].append(
                distillation(image, text, teacher_image, teacher_text, scale=scale, dims=self.dims, scales=self.scales)
            )
        terms = {
            "contrastive": self.contrast * torch.stack(found["contrastive"]).sum(),
            "distill": self.distill * torch.stack(found["distill"]).sum(),
        }
        return {"loss": terms["contrastive"] + terms["distill"], **terms}


def _gathered(x: Tensor) -> Tensor:
    from clipgraft.distributed import gather_with_grad

    return gather_with_grad(x)
