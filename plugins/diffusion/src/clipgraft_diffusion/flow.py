"""Rectified flow: which noise levels, the noisy latent, and the error of a predicted velocity.

Sign convention of the official code: t is the *noise* level, ``x_t = (1 - t) x1 + t x0`` with the clean latent x1 and
noise x0, and the velocity to predict is ``x0 - x1``. The paper writes the mirror image (t = 1 is clean, velocity
``x1 - x0``); flipping the sign and t -> 1 - t maps one onto the other exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from clipgraft_diffusion.eps import Denoiser, averaged

Compat = Literal["official", "fixed"]
Prediction = Literal["velocity", "sample"]


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
    """Clean x1 (B, ...), noise x0 (B, ...), noise level t (B,) -> x_t (B, ...)."""
    level = _beside(t, x1)
    return (1 - level) * x1 + level * x0


def velocity(x1: Tensor, x0: Tensor) -> Tensor:
    """d x_t / d t, the target."""
    return x0 - x1


def velocity_of_sample(x_t: Tensor, sample: Tensor, t: Tensor, *, floor: float = 0.05) -> Tensor:
    """The velocity that a predicted clean latent ``sample`` implies: (x_t - sample) / t, all (B, ...).

    t is floored so that the error, which is divided by t squared, stays bounded near the clean end.
    """
    return (x_t - sample) / _beside(t.clamp_min(floor), x_t)


def _beside(t: Tensor, x: Tensor) -> Tensor:
    """t (B,), shaped and typed to multiply x (B, ...)."""
    return t.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)


def flow_losses(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error per sample in fp32: two (B, ...) -> (B,); its mean is the objective."""
    return (predicted.float() - target.float()).square().flatten(1).mean(1)


class FlowLoss(nn.Module):
    """Mean squared error of the velocity, per sample; noise levels from ``times``, ``draws`` draws are averaged.

    ``prediction`` says what a denoiser puts out: the velocity, or the clean latent, whose velocity is then formed.
    """

    def __init__(self, times: TimeLaw, *, prediction: Prediction = "velocity", draws: int = 1) -> None:
        super().__init__()
        self.times: TimeLaw = times
        self.prediction: Prediction = prediction
        self.draws = draws

    def draw(self, x1: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Noise levels (B,) first, then the noise (B, ...)."""
        t = self.times.sample(len(x1), device=x1.device, generator=generator)
        return t, torch.randn(x1.shape, device=x1.device, generator=generator)

    def at(self, denoiser: Denoiser, x1: Tensor, condition: Any, t: Tensor, x0: Tensor) -> Tensor:
        """Clean latents x1 (B, ...), condition, noise levels (B,), noise x0 (B, ...) -> losses (B,)."""
        x_t = mix(x1, x0, t)
        out = denoiser(x_t, t, condition)
        predicted = velocity_of_sample(x_t, out.float(), t) if self.prediction == "sample" else out
        return flow_losses(predicted, velocity(x1, x0))

    def forward(
        self, denoiser: Denoiser, x1: Tensor, condition: Any, generator: torch.Generator | None = None
    ) -> Tensor:
        """Clean latents (B, ...) and their condition -> losses (B,); their mean is the objective."""
        return averaged(self.draws, lambda: self.at(denoiser, x1, condition, *self.draw(x1, generator)))


def network_time(t: Tensor, *, compat: Compat) -> Tensor:
    """The noise level (B,) as the network sees it; x_t always uses the exact one.

    ``official`` forms 1000 t in bf16, which moves t by up to .002 (.1234 -> .1235, .789 -> .788); ``fixed`` keeps fp32.
    """
    return (t.bfloat16() * 1000).float() / 1000 if compat == "official" else t.float()
