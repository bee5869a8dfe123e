"""Symmetric InfoNCE over all pairs of the global batch (Radford et al. 2021, arXiv 2103.00020, figure 3)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from clipgraft.config.schema import Config
from clipgraft.losses.base import Loss, LossInputs, gathered_unit


class ClipLossConfig(Config):
    """Settings of ``core/clip``."""

    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all pairs")


class ClipLoss(Loss):
    """Image i belongs to text i and to no other one."""

    batch_coupled: ClassVar[bool] = True
    reduction: ClassVar[Literal["local", "global", "ring"]] = "global"
    needs_scale = True

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Mean cross-entropy of both directions, and each."""
        image, text = gathered_unit(inputs.need("image")), gathered_unit(inputs.need("text"))
        logits = inputs.need("logit_scale") * image @ text.T  # (W*B, W*B); a bias would cancel in the softmax
        own = torch.arange(len(logits), device=logits.device)
        to_text = F.cross_entropy(logits, own, label_smoothing=self.label_smoothing)
        to_image = F.cross_entropy(logits.T, own, label_smoothing=self.label_smoothing)
        return {"loss": (to_text + to_image) / 2, "image_to_text": to_text, "text_to_image": to_image}
