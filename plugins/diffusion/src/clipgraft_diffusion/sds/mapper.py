"""The map from CLIP's image embedding to a generator's latent: one linear layer that is gone after training.

Registered as the head ``diffusion/latent-mapper``.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft.config.schema import Config
from clipgraft.types import widened


class LatentMapperConfig(Config):
    """Settings of the head ``diffusion/latent-mapper``."""

    embed_dim: int = Field(gt=0, description="width D of the embedding")
    latent: tuple[int, ...] = Field((4, 64, 64), min_length=1, description="shape of the latent, without the batch")
    unit: bool = Field(True, description="bring the embedding to length sqrt(D) first; otherwise it is taken as it is")

    @field_validator("latent")
    @classmethod
    def _positive(cls, latent: tuple[int, ...]) -> tuple[int, ...]:
        if min(latent) < 1:
            raise ValueError(f"latent {list(latent)} must hold positive sizes, such as [4, 64, 64]")
        return latent


class LatentMapper(nn.Module):
    """u = h(z): embeddings (B, D) -> latents (B, *latent), h linear with ``nn.Linear``'s random start.

    ``unit``: z goes in with length sqrt(D), so that its entries have variance 1 for every backbone and only its
    direction, which is all that CLIP's cosines see, gets a gradient. Nothing but the distillation loss holds the scale
    of u; ``size`` measures it.
    """

    def __init__(self, embed_dim: int, *, latent: tuple[int, ...] = (4, 64, 64), unit: bool = True) -> None:
        super().__init__()
        self.latent, self.unit = tuple(latent), unit
        self.linear = nn.Linear(embed_dim, math.prod(latent))

    def forward(self, z: Tensor) -> Tensor:
        """(B, D) -> (B, *latent) in fp32."""
        with torch.autocast(z.device.type, enabled=False):
            z = widened(z)
            told = F.normalize(z, dim=-1) * z.shape[-1] ** 0.5 if self.unit else z
            u: Tensor = self.linear(told)
        return u.view(len(z), *self.latent)


def size(u: Tensor) -> Tensor:
    """Latents (B, ...) -> log(||u|| / sqrt(dim)) (B,): 0 for the variance that generators are trained on."""
    return u.detach().flatten(1).square().mean(1).clamp_min(1e-20).log() / 2
