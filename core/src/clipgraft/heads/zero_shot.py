"""A classifier written in words."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft.config.schema import Config


class ZeroShotConfig(Config):
    """Settings of the head ``core/zero-shot``."""

    dim: int = Field(gt=0, description="width D of the joint space")
    classes: int = Field(gt=1, description="number of classes K")
    scale: float = Field(100.0, gt=0, description="logits per unit of cosine")


class ZeroShotHead(nn.Module):
    """Scaled cosines to ``weights`` (K, D): class embeddings such as ``EncoderFeatures.classifier`` returns."""

    weights: Tensor

    def __init__(self, *, dim: int, classes: int, scale: float = 100.0) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("weights", torch.zeros(classes, dim))

    def forward(self, image: Tensor) -> Tensor:
        """(B, D) image embeddings of any length -> (B, K) logits."""
        return self.scale * F.normalize(image, dim=-1) @ F.normalize(self.weights, dim=-1).T
