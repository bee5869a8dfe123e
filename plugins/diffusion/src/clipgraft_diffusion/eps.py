"""The eps and v objectives: clean latent, noise and a step of a DDPM schedule in, error of the prediction out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

Beta = Literal["scaled_linear", "linear"]
Error = Literal["noise", "sample"]
Target = Literal["noise", "velocity"]
"""What a model puts out: the noise, or v = sqrt(ab_t) noise - sqrt(1 - ab_t) x0 (Salimans and Ho 2022)."""


class Denoiser(Protocol):
    """Any model that is asked what a noisy latent hides."""

    def __call__(self, x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        """Noisy latents (B, ...), steps or noise levels (B,), what it is told -> what it predicts (B, ...)."""


class EpsDenoiser(Protocol):
    """A frozen generative model as a recipe sees it. ``width`` is that of its condition."""

    width: int

    def latents(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W') in [0, 1] -> clean latents (B, ...), fp32, without gradient."""

    def __call__(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Noisy latents (B, ...), steps (B,) int64, condition (B, ...) -> what it predicts (B, ...) in fp32."""


class NoiseSchedule(nn.Module):
    """Cumulative alphas (T,) of diffusers' ``DDPMScheduler``; the defaults are Stable Diffusion's.

    The official code builds an Euler scheduler and takes its alphas, which are the same; Euler's own ``add_noise``
    works in another space and would be wrong here.
    """

    alphas: Tensor

    def __init__(
        self, *, beta: Beta = "scaled_linear", start: float = 0.00085, end: float = 0.012, steps: int = 1000
    ) -> None:
        super().__init__()
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        ddpm = DDPMScheduler(num_train_timesteps=steps, beta_start=start, beta_end=end, beta_schedule=beta)
        self.register_buffer("alphas", ddpm.alphas_cumprod.float(), persistent=False)

    def __len__(self) -> int:
        return len(self.alphas)

    def levels(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Steps (B,) -> signal and noise shares sqrt(ab_t), sqrt(1 - ab_t), shaped to multiply ``like`` (B, ...)."""
        share = self.alphas[t].view(-1, *[1] * (like.ndim - 1))
        return share.sqrt(), (1 - share).sqrt()

    def mix(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Clean latents, noise (B, ...) and steps (B,) -> x_t."""
        signal, rest = self.levels(t, x0)
        return signal * x0 + rest * noise

    def velocity(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Clean latents, noise (B, ...) and steps (B,) -> v = sqrt(ab_t) noise - sqrt(1 - ab_t) x0."""
        signal, rest = self.levels(t, x0)
        return signal * noise - rest * x0

    def noise_of_velocity(self, v: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """v and noisy latents (B, ...), steps (B,) -> the noise sqrt(ab_t) v + sqrt(1 - ab_t) x_t."""
        signal, rest = self.levels(t, x_t)
        return signal * v + rest * x_t


class EpsLoss(nn.Module):
    """Mean squared error of what a denoiser predicts, per sample; steps uniform in [low, high).

    ``target`` says what that is. The error of v is that of the noise it implies, weighed by 1 / ab_t. ``draws`` draws
    of step and noise are averaged; the graphs of all of them are held (``passes.several_passes`` holds one).

    Deviation: ``error="sample"`` states the same error in the clean latent, (1 - ab_t) / ab_t times that of the noise
    and 1 - ab_t times that of v, so that all noise levels weigh alike; a miniature trains near pure noise, where the
    error of the noise hardly moves.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        *,
        low: int = 0,
        high: int | None = None,
        error: Error = "noise",
        target: Target = "noise",
        draws: int = 1,
    ) -> None:
        super().__init__()
        self.schedule: NoiseSchedule = schedule
        self.low, self.high, self.error = low, len(schedule) if high is None else high, error
        self.target: Target = target
        self.draws = draws

    def draw(self, x0: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Steps (B,) first, then the noise (B, ...): the official order."""
        t = torch.randint(self.low, self.high, (len(x0),), device=x0.device, generator=generator)
        return t, torch.randn(x0.shape, device=x0.device, generator=generator)

    def at(self, denoiser: Denoiser, x0: Tensor, condition: Any, t: Tensor, noise: Tensor) -> Tensor:
        """Clean latents (B, ...), condition, steps (B,), noise (B, ...) -> losses (B,)."""
        predicted = denoiser(self.schedule.mix(x0, noise, t), t, condition).float()
        wanted = noise if self.target == "noise" else self.schedule.velocity(x0, noise, t)
        losses = (predicted - wanted).square().flatten(1).mean(1)
        if self.error == "noise":
            return losses
        share = self.schedule.alphas[t]
        return losses * ((1 - share) / share if self.target == "noise" else 1 - share)

    def forward(
        self, denoiser: Denoiser, x0: Tensor, condition: Any, generator: torch.Generator | None = None
    ) -> Tensor:
        """Clean latents (B, ...) and their condition -> losses (B,); their mean is the objective."""
        return averaged(self.draws, lambda: self.at(denoiser, x0, condition, *self.draw(x0, generator)))


def averaged(draws: int, once: Callable[[], Tensor]) -> Tensor:
    """Losses (B,) of ``draws`` draws, each sample's mean."""
    return torch.stack([once() for _ in range(draws)]).mean(0)


class EpsObjective(nn.Module):
    """An ``EpsLoss`` with the frozen model that it asks; one draw, given or made by ``draw``."""

    def __init__(
        self,
        schedule: NoiseSchedule,
        denoiser: EpsDenoiser,
        *,
        low: int = 0,
        high: int | None = None,
        error: Error = "noise",
        target: Target = "noise",
    ) -> None:
        super().__init__()
        self.loss: EpsLoss = EpsLoss(schedule, low=low, high=high, error=error, target=target)
        self.denoiser: EpsDenoiser = denoiser

    @property
    def schedule(self) -> NoiseSchedule:
        """Whose steps are drawn."""
        return self.loss.schedule

    def draw(self, x0: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Steps (B,) and noise (B, ...)."""
        return self.loss.draw(x0, generator)

    def forward(self, x0: Tensor, condition: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Clean latents (B, ...), condition (B, ...), steps (B,), noise (B, ...) -> losses (B,)."""
        return self.loss.at(self.denoiser, x0, condition, t, noise)
