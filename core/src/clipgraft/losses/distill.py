"""Staying close to, or learning from, a frozen teacher."""

from __future__ import annotations

from typing import Literal

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
    on: Literal["pooled", "tokens"] = Field("pooled", description="what mode feature compares")
    temperature: float = Field(0.01, gt=0, description="of the softmax over similarities in mode contrastive-soft")


def distill(*, mode: str = "cosine", on: str = "pooled", temperature: float = 0.01) -> Loss:
    """The loss of a mode; values as in ``DistillConfig``."""
    if mode == "contrastive-soft":
        return SoftContrastiveDistill(temperature=temperature)
    return FeatureDistill(tokens=on == "tokens") if mode == "feature" else CosineDistill()


class CosineDistill(Loss):
    """1 - cosine to the teacher's embedding, of images and, where the teacher has them, of texts."""

    def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Mean over what is compared, and each."""
        found = {"image": 1 - F.cosine_similarity(*_both(inputs, "image")).mean()}
        if inputs.teacher_text is not None:
            found["text"] = 1 - F.cosine_similarity(*_both(inputs, "text")).mean()
        return {"loss": sum(found.values(), start=found["image"] * 0) / len(found), **found}


class FeatureDistill(Loss):
    """Mean squared error to the teacher's pooled embedding or patch tokens, not normalised."""

    def __init__(self, *, tokens: bool = False) -> None:
        super().__init__()
        self.needs_tokens = tokens

    def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Mean over all entries."""
        return {"loss": F.mse_loss(*_both(inputs, "tokens" if self.needs_tokens else "image"))}


class SoftContrastiveDistill(Loss):
    """KL(teacher || student) of the similarities in the global batch, mean over rows and both directions."""

    batch_coupled = True
    reduction = "global"

    def __init__(self, *, temperature: float = 0.01) -> None:
        super().__init__()
        self.temperature = temperature

    def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Only similarities are compared, so the teacher may have another D."""
        s, t = (
            gathered_unit(inputs.need(f"{who}image")) @ gathered_unit(inputs.need(f"{who}text")).T / self.temperature
            for who in ("", "teacher_")
        )  # (W*B, W*B) each
        rows = F.kl_div(s.log_softmax(1), t.log_softmax(1), log_target=True, reduction="batchmean")
        columns = F.kl_div(s.log_softmax(0), t.log_softmax(0), log_target=True, reduction="sum") / len(s)
        return {"loss": (rows + columns) / 2, "image_to_text": rows, "text_to_image": columns}


def _both(inputs: LossInputs, name: str) -> tuple[Tensor, Tensor]:
    """Student's and teacher's features, of equal shape."""
    student, teacher = inputs.need(name), inputs.need(f"teacher_{name}")
    if student.shape != teacher.shape:
        raise InputError(
            f"{name} has shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}; take a teacher of "
            "the same width and grid, or core/distill with mode: contrastive-soft"
        )
    return student, teacher
