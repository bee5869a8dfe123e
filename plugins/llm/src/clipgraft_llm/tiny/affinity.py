"""Affinity mimicking: the student's image-text softmax against the teacher's (Wu et al., TinyCLIP, ICCV 2023,

arXiv 2309.12314, section 3.1). Only G x G matrices meet, so student and teacher may have different widths.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from clipgraft.config.schema import Config
from clipgraft.losses.base import Loss, LossInputs, gathered_unit


def affinity_loss(
    image: Tensor,
    text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    *,
    scale: Tensor | float,
    teacher_scale: Tensor | float,
) -> dict[str, Tensor]:
    """Unit (G, D) of the student, unit (G, D') of the teacher -> cross-entropy to the teacher's softmax, both ways.

    The smallest value is the entropy of the teacher, not 0.
    """
    logits = scale * image @ text.T  # (G, G)
    target = (teacher_scale * teacher_image @ teacher_text.T).detach()
    rows = -(target.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    columns = -(target.softmax(0) * logits.log_softmax(0)).sum(0).mean()
    return {"loss": (rows + columns) / 2, "image_to_text": rows, "text_to_image": columns}


class AffinityConfig(Config):
    """Settings of ``llm/affinity``."""

    scale: float | None = Field(
        50.0, gt=0, description="of the student's cosines, fixed; null takes and trains the model's own"
    )
    teacher_scale: float = Field(50.0, gt=0, description="of the teacher's cosines")


class AffinityLoss(Loss):
    """The global batch, rows and columns of all ranks."""

    batch_coupled = True
    reduction = "global"

    def __init__(self, *, scale: float | None = 50.0, teacher_scale: float = 50.0) -> None:
        super().__init__()
        self.scale, self.teacher_scale, self.needs_scale = scale, teacher_scale, scale is None

    def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Both directions, and each."""
        names = ("image", "text", "teacher_image", "teacher_text")
        image, text, teacher_image, teacher_text = (gathered_unit(inputs.need(name)) for name in names)
        scale = inputs.need("logit_scale") if self.scale is None else self.scale
        return affinity_loss(image, text, teacher_image, teacher_text, scale=scale, teacher_scale=self.teacher_scale)
