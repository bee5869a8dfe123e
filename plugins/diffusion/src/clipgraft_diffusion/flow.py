"""Rectified flow: which noise levels, the noisy latent, and the error of a predicted velocity.

Sign convention of the official code: t is the *noise* level, ``x_t = (1 - t) x1 + t x0`` with the clean latent x1 and
noise x0, and the velocity to predict is ``x0 - x1``. The paper writes the mirror image (t = 1 is clean, velocity
``x1 - x0``); flipping the sign and t -> 1 - t maps one onto the other exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Compat = Literal["official", "fixed"]


class TimeLaw(Protocol):
    """A distribution of noise levels."""

    def sample(self, size: int, *, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """(size,) noise levels in [0, 1], fp32."""


@dataclass(frozen=True, slots=True)
class LogitNormal:
    """t = sigmoid(scale * n), n ~ N(0, 1). The paper's best scale is 1: mean .5, standard deviation .209."""

    scale: float = 1.0

    def sample(self, size: int, *, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """(size,) noise levels."""
        return torch.sigmoid(self.scale * torch.randn(size, device=device, generator=generator))


@dataclass(frozen=True, slots=True)
class Uniform:
    """t uniform in [low, high]."""

    low: float = 0.0
    high: float = 1.0

    def sample(self, size: int, *, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """(size,) noise levels."""
        return self.low + (self.high - self.low) * torch.rand(size, device=device, generator=generator)


def mix(x1: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """Clean x1 (B, N, C), noise x0 (B, N, C), noise level t (B,) -> x_t (B, N, C)."""
    level = t[:, None, None].to(x1.dtype)
    return (1 - level) * x1 + level * x0


def velocity(x1: Tensor, x0: Tensor) -> Tensor:
    """d x_t / d t, the target."""
    return x0 - x1


def velocity_of_sample(x_t: Tensor, sample: Tensor, t: Tensor, *, floor: float = 0.05) -> Tensor:
    """The velocity that a predicted clean latent ``sample`` implies: (x_t - sample) / t, all (B, N, C).

    t is floored so that the error, which is divided by t squared, stays bounded near the clean end.
    """
    return (x_t - sample) / t.clamp_min(floor)[:, None, None].to(x_t.dtype)


def flow_losses(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error per sample in fp32: two (B, N, C) -> (B,); its mean is the objective."""
    return (predicted.float() - target.float()).square().flatten(1).mean(1)


def network_time(t: Tensor, *, compat: Compat) -> Tensor:
    """The noise level (B,) as the network sees it; x_t always uses the exact one.

    ``official`` forms 1000 t in bf16, which moves t by up to .002 (.1234 -> .1235, .789 -> .788); ``fixed`` keeps fp32.
    """
    return (t.bfloat16() * 1000).float() / 1000 if compat == "official" else t.float()
