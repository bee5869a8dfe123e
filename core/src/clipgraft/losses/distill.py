"""Staying close to, or learning from, a frozen teacher."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from clipgraft.config.schema import Config
from clipgraft.errors import InputError
from clipgraft.losses.base import Loss, LossInputs, gathered_unit


class DistillConfig(Config):
    """Settings of ``core/distill``."""

    mode: Literal["cosine", "feature", "contrastive-soft"] = Field(
        "cosine", description="angle of embeddings, mean squared error of features, or KL of image-text similarities"
    )
    on: Literal["pooled", "tokens"] = Field("pooled", description="features that mode feature compares")
    temperature: float = Field(0.01, gt=0, description="of the softmax over similarities in mode contrastive-soft")


def distill(
    *,
    mode: Literal["cosine", "feature", "contrastive-soft"] = "cosine",
    on: Literal["pooled", "tokens"] = "pooled",
    temperature: float = 0.01,
) -> Loss:
    """The loss of a mode."""
    if mode == "cosine":
        return CosineDistill()
    return FeatureDistill(on=on) if mode == "feature" else SoftContrastiveDistill(temperature=temperature)


class CosineDistill(Loss):
    """1 - cosine to the teacher's embedding, of images and, where the teacher has them, of texts."""

    def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Mean over what is compared."""
        names = ["image"] if inputs.teacher_text is None else ["image", "text"]
        found = {name: 1 - F.cosine_similarity(*_pair(inputs, name), dim=-1).mean() for name in names}
        return {"loss": sum(found.values(), start=inputs.need("image").new_zeros(())) / len(found), **found}


class FeatureDistill(Loss):
    """Mean squared error to the teacher's patch tokens or pooled embedding, neither normalised."""

    def __init__(self, *, on: Literal["pooled", "tokens"] = "pooled") -> None:
        super().__init__()
        self.needs_tokens = on == "tokens"

    def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Mean over all entries."""
        return {"loss": F.mse_loss(*_pair(inputs, "tokens" if self.needs_tokens else "image"))}


class SoftContrastiveDistill(Loss):
    """KL(teacher || student) of the similarities within the global batch, mean of rows and of both directions."""

    batch_coupled: ClassVar[bool] = True
    reduction: ClassVar[Literal["local", "global", "ring"]] = "global"

    def __init__(self, *, temperature: float = 0.01) -> None:
        super().__init__()
        self.temperature = temperature

    def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        """The teacher may have another D: only similarities are compared."""
        student = gathered_unit(inputs.need("image")) @ gathered_unit(inputs.need("text")).T / self.temperature
        teacher_image, teacher_text = inputs.need("teacher_image").detach(), inputs.need("teacher_text").detach()
        teacher = gathered_unit(teacher_image) @ gathered_unit(teacher_text).T / self.temperature  # (W*B, W*B)
        found = {
            name: F.kl_div(s.log_softmax(-1), t.log_softmax(-1), log_target=True, reduction="batchmean")
            for name, s, t in (("image_to_text", student, teacher), ("text_to_image", student.T, teacher.T))
        }
        return {"loss": (found["image_to_text"] + found["text_to_image"]) / 2, **found}


def _pair(inputs: LossInputs, name: str) -> tuple[Tensor, Tensor]:
    """Student's and teacher's features of equal shape."""
    student, teacher = inputs.need(name), inputs.need(f"teacher_{name}").detach()
    if student.shape != teacher.shape:
        raise InputError(
            f"the student's {name} has shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}; choose a "
            "teacher of the same width and grid, or distill with mode: contrastive-soft"
        )
    return student, teacher
