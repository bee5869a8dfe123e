"""The objectives by name: losses that score a generator, for any plugin that brings one.

``registry.build("loss", "diffusion/eps", {...})`` gives an object that is called as ``loss(denoiser, x0, condition,
generator=None)`` and returns losses (B,), one per sample, whose mean is the objective. ``denoiser(x_t, t, condition)``
is any model; what its condition looks like is between the two. ``loss.draw(x0, generator)`` and
``loss.at(denoiser, x0, condition, *drawn)`` are its two halves, for who scores two conditions at the same noise. The
recipes of this plugin judge by the same objects.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from pydantic import Field, model_validator
from torch import Tensor

from clipgraft.config.schema import Config
from clipgraft_diffusion.eps import Beta, EpsLoss, Error, NoiseSchedule, Target
from clipgraft_diffusion.flow import FlowLoss, LogitNormal, Prediction, TimeLaw, Uniform
from clipgraft_diffusion.masked import MaskedTokenLoss, MaskLaw


class GenerativeLoss(Protocol):
    """What every loss of this plugin is: it scores ``denoiser`` on clean latents x0 (B, ...) under a condition."""

    def __call__(self, denoiser: Any, x0: Tensor, condition: Any, generator: torch.Generator | None = None) -> Tensor:
        """Losses (B,), each the mean over its draws."""


class NoiseConfig(Config):
    """The DDPM schedule and which of its steps are drawn."""

    beta: Literal["scaled_linear", "linear"] = Field("scaled_linear", description="how the variances grow")
    start: float = Field(0.00085, gt=0, lt=1, description="first variance")
    end: float = Field(0.012, gt=0, lt=1, description="last variance")
    steps: int = Field(1000, gt=0, description="length of the schedule")
    low: int = Field(0, ge=0, description="first step that is drawn")
    high: int | None = Field(None, gt=0, description="one behind the last step that is drawn; null: all")
    error: Literal["noise", "sample"] = Field(
        "noise", description="of the noise, or the same stated in the clean latent"
    )

    @model_validator(mode="after")
    def _ordered(self) -> NoiseConfig:
        if not self.low < (self.high or self.steps) <= self.steps:
            raise ValueError(f"low {self.low} must be below high {self.high}, and high at most steps {self.steps}")
        return self


class EpsConfig(NoiseConfig):
    """Settings of ``diffusion/eps`` and ``diffusion/v``."""

    draws: int = Field(1, gt=0, description="draws of step and noise per call, averaged")


class TimesConfig(Config):
    """The law of noise levels."""

    law: Literal["logit-normal", "uniform"] = Field("logit-normal", description="how times are drawn")
    scale: float = Field(1.0, gt=0, description="spread of the logit-normal law")
    low: float = Field(0.0, ge=0, le=1, description="of the uniform law")
    high: float = Field(1.0, ge=0, le=1, description="of the uniform law")

    @model_validator(mode="after")
    def _ordered(self) -> TimesConfig:
        if self.low >= self.high:
            raise ValueError(f"low {self.low} must be below high {self.high}")
        return self

    def build(self) -> TimeLaw:
        """The law."""
        return LogitNormal(self.scale) if self.law == "logit-normal" else Uniform(self.low, self.high)


class FlowLossConfig(TimesConfig):
    """Settings of ``diffusion/flow``."""

    prediction: Literal["velocity", "sample"] = Field(
        "velocity", description="what the denoiser puts out: the velocity, or the clean latent"
    )
    draws: int = Field(1, gt=0, description="draws of time and noise per call, averaged")


class MaskConfig(Config):
    """The share of hidden codes, one per batch."""

    low: float = Field(0.5, gt=0, lt=1, description="lowest share")
    high: float = Field(0.9, gt=0, lt=1, description="highest share")

    @model_validator(mode="after")
    def _ordered(self) -> MaskConfig:
        if self.low > self.high:
            raise ValueError(f"low {self.low} must not be above high {self.high}")
        return self

    def build(self) -> MaskLaw:
        """The law."""
        return MaskLaw(self.low, self.high)


class MaskedTokenConfig(MaskConfig):
    """Settings of ``diffusion/masked-token``."""

    draws: int = Field(1, gt=0, description="masks per call, their losses averaged")


def eps_loss(
    *,
    beta: Beta = "scaled_linear",
    start: float = 0.00085,
    end: float = 0.012,
    steps: int = 1000,
    low: int = 0,
    high: int | None = None,
    error: Error = "noise",
    draws: int = 1,
    target: Target = "noise",
) -> EpsLoss:
    """The loss ``diffusion/eps``: ``denoiser(x_t, steps (B,) int64, condition)`` must name the noise on x_t."""
    schedule = NoiseSchedule(beta=beta, start=start, end=end, steps=steps)
    return EpsLoss(schedule, low=low, high=high, error=error, target=target, draws=draws)


def v_loss(**settings: Any) -> EpsLoss:
    """The loss ``diffusion/v``: as ``eps_loss``, but the denoiser names v = sqrt(ab_t) noise - sqrt(1 - ab_t) x0."""
    return eps_loss(target="velocity", **settings)


def flow_loss(*, prediction: Prediction = "velocity", draws: int = 1, **law: Any) -> FlowLoss:
    """The loss ``diffusion/flow``: ``denoiser(x_t, noise levels (B,) in [0, 1], condition)`` must name noise - x0.

    ``law``, ``scale``, ``low`` and ``high`` as in ``TimesConfig``.
    """
    return FlowLoss(TimesConfig(**law).build(), prediction=prediction, draws=draws)


def masked_token_loss(*, low: float = 0.5, high: float = 0.9, draws: int = 1) -> MaskedTokenLoss:
    """The loss ``diffusion/masked-token``: x0 are codes (B, L) int64, and a ``CodePredictor`` must name hidden ones."""
    return MaskedTokenLoss(MaskLaw(low, high), draws=draws)
