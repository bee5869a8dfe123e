"""What an unCLIP decoder is told: the image embedding with noise on it, and how much that is.

The path of Stable unCLIP (Ramesh et al., Hierarchical Text-Conditional Image Generation with CLIP Latents, 2022, arXiv
2204.06125; in diffusers ``StableUnCLIPImg2ImgPipeline.noise_image_embeddings``): standardise, mix with noise at a level
of a cosine schedule, undo the standardising, append a sinusoidal embedding of the level. Registered as the head
``diffusion/unclip-label``. B batch, D joint embedding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from clipgraft.config.schema import Config
from clipgraft.errors import InputError

LEVELS = 1000
"""Noise levels of the released models."""
BETAS = "squaredcos_cap_v2"
"""diffusers' name of their schedule."""
NoiseLevel = Annotated[int, Field(ge=0, lt=LEVELS)] | Literal["uniform", "off"]
"""A fixed level, a level drawn per sample, or no noise at all (told as level 0, which has a spread of .0064)."""


class UnclipLabelConfig(Config):
    """Settings of the head ``diffusion/unclip-label``."""

    embed_dim: int = Field(..., gt=0, description="width of the image embedding")
    noise_level: NoiseLevel = Field(0, description="noise on the embedding: a level, uniform (drawn), or off")


class UnclipLabel(nn.Module):
    """z (B, D), not normalised -> class labels (B, 2D) in fp32. It has no weights, only statistics.

    ``mean`` and ``std`` (1, D) come from a released normaliser or from ``estimate``; at first 0 and 1.
    """

    mean: Tensor
    std: Tensor
    alphas: Tensor

    def __init__(self, *, embed_dim: int, noise_level: int | Literal["uniform", "off"] = 0) -> None:
        super().__init__()
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        self.embed_dim, self.noise_level = embed_dim, noise_level
        self.register_buffer("mean", torch.zeros(1, embed_dim))
        self.register_buffer("std", torch.ones(1, embed_dim))
        schedule = DDPMScheduler(num_train_timesteps=LEVELS, beta_schedule=BETAS)
        self.register_buffer("alphas", schedule.alphas_cumprod.float(), persistent=False)

    @torch.no_grad()
    def estimate(self, batches: Iterable[Tensor]) -> None:
        """Set the statistics from batches of embeddings, each (b, D); two moments in float64."""
        count, total, square = 0, torch.zeros(()), torch.zeros(())
        for z in batches:
            x = z.double().cpu()
            count, total, square = count + len(x), total + x.sum(0), square + x.square().sum(0)
        if count < 2:
            raise InputError("an unCLIP label needs two or more readable images for its statistics; check data.from")
        mean = total / count
        self.mean.copy_(mean)
        self.std.copy_((square / count - mean.square()).clamp_min(0).sqrt() + 1e-6)

    def draw(self, size: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """Noise levels (B,) int64."""
        if self.noise_level == "uniform":
            return torch.randint(0, LEVELS, (size,), device=device, generator=generator)
        level = 0 if isinstance(self.noise_level, str) else self.noise_level
        return torch.full((size,), level, dtype=torch.long, device=device)

    def forward(
        self,
        z: Tensor,
        *,
        level: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """z (B, D) -> (B, 2D). ``level`` (B,) and ``noise`` (B, D) are drawn in this order where not given."""
        z = z.float()
        level = self.draw(len(z), z.device, generator) if level is None else level
        if self.noise_level != "off":
            noise = torch.randn(z.shape, device=z.device, generator=generator) if noise is None else noise
            share = self.alphas[level][:, None]
            mixed = share.sqrt() * (z - self.mean) / self.std + (1 - share).sqrt() * noise
            z = self.mean + self.std * mixed
        return torch.cat([z, sinusoid(level, self.embed_dim)], -1)


def sinusoid(level: Tensor, width: int) -> Tensor:
    """Levels (B,) -> (B, width): cosines, then sines, of falling frequencies from 1 to 1 / 10000; an odd end is 0."""
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=level.device) / half)
    angles = level.float()[:, None] * frequencies
    return nn.functional.pad(torch.cat([angles.cos(), angles.sin()], -1), (0, width % 2))
