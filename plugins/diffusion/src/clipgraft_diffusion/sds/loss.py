"""Score distillation: a latent is good when a frozen generator, told the caption, can name the noise on it.

Registered as the loss ``diffusion/sds``, called like the objectives of this plugin. The gradient comes in two kinds
that are not interchangeable: ``full`` differentiates the squared error through the frozen generator (SDS-CLIP's
formula), ``none`` takes the error itself as the gradient of the latent (score distillation as in Poole et al.,
DreamFusion, 2022, arXiv 2209.14988).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from clipgraft_diffusion.eps import Beta, Denoiser, EpsLoss, Error, NoiseSchedule, averaged
from clipgraft_diffusion.objectives import EpsConfig

Jacobian = Literal["full", "none"]
Weighting = Literal["one", "signal", "variance"]


class SdsConfig(EpsConfig):
    """Settings of ``diffusion/sds``."""

    jacobian: Jacobian = Field(
        "full", description="gradient through the generator, or none: its error is the gradient of the latent"
    )
    weighting: Weighting = Field(
        "one", description="w(t): 1, the signal's share sqrt(ab_t), or the noise's variance 1 - ab_t"
    )


class SdsLoss(nn.Module):
    """Losses (B,) of latents u (B, ...) whose gradient is meant, ``e`` the error of the predicted noise.

    ``full``: w(t) times the mean of e squared over the latent's entries. ``none``: half the mean of the squared
    g = w(t) e, whose gradient by u is g / entries; the generator runs without a graph. The mean keeps lambda free of
    the latent's size: a sum over 4 x 64 x 64 entries would weigh 16,384 times as much. ``error="sample"`` states e in
    the clean latent, sqrt((1 - ab_t) / ab_t) times as large; then g is u minus the clean latent that the generator
    sees (w = 1).
    """

    def __init__(self, inner: EpsLoss, *, jacobian: Jacobian = "full", weighting: Weighting = "one") -> None:
        super().__init__()
        self.inner: EpsLoss = inner
        self.jacobian: Jacobian = jacobian
        self.weighting: Weighting = weighting

    @property
    def schedule(self) -> NoiseSchedule:
        """Whose steps are drawn."""
        return self.inner.schedule

    def draw(self, u: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Steps (B,) and noise (B, ...)."""
        return self.inner.draw(u, generator)

    def weigh(self, t: Tensor) -> Tensor:
        """w(t) (B,)."""
        share = self.schedule.alphas[t]
        if self.weighting == "one":
            return torch.ones_like(share)
        return share.sqrt() if self.weighting == "signal" else 1 - share

    def at(self, denoiser: Denoiser, u: Tensor, condition: Any, t: Tensor, noise: Tensor) -> Tensor:
        """Latents u (B, ...), condition, steps (B,), noise (B, ...) -> losses (B,)."""
        if self.jacobian == "full":
            return self.weigh(t) * self.inner.at(denoiser, u, condition, t, noise)
        with torch.no_grad():
            error = denoiser(self.schedule.mix(u, noise, t), t, condition).float() - noise
            scale = self.weigh(t)
            if self.inner.error == "sample":
                share = self.schedule.alphas[t]
                scale = scale * ((1 - share) / share).sqrt()
            g = scale.view(-1, *[1] * (u.ndim - 1)) * error
        return 0.5 * (u - u.detach() + g).square().flatten(1).mean(1)

    def forward(
        self, denoiser: Denoiser, u: Tensor, condition: Any, generator: torch.Generator | None = None
    ) -> Tensor:
        """Latents (B, ...) and their condition -> losses (B,); their mean is the objective."""
        return averaged(self.inner.draws, lambda: self.at(denoiser, u, condition, *self.draw(u, generator)))


def sds_loss(
    *,
    beta: Beta = "scaled_linear",
    start: float = 0.00085,
    end: float = 0.012,
    steps: int = 1000,
    low: int = 0,
    high: int | None = None,
    error: Error = "noise",
    draws: int = 1,
    jacobian: Jacobian = "full",
    weighting: Weighting = "one",
) -> SdsLoss:
    """The loss ``diffusion/sds``: ``denoiser(u_t, steps (B,) int64, condition)`` must name the noise on the latent."""
    schedule = NoiseSchedule(beta=beta, start=start, end=end, steps=steps)
    inner = EpsLoss(schedule, low=low, high=high, error=error, draws=draws)
    return SdsLoss(inner, jacobian=jacobian, weighting=weighting)
