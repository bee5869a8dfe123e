"""The generator's verdict on an embedding: how well it restores the image's latent when told that embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from clipgraft_diffusion.condition import GlobalCondition
from clipgraft_diffusion.denoiser import FluxDenoiser
from clipgraft_diffusion.flow import FlowLoss, TimeLaw


@dataclass(frozen=True, slots=True)
class ConditionGap:
    """Mean loss with each image's own condition and with another image's, same noise and noise levels."""

    right: float
    wrong: float
    term: str = "flow"

    @property
    def gap(self) -> float:
        """Relative rise of the loss; 0 means that the generator ignores what it is told."""
        return self.wrong / self.right - 1

    def metrics(self) -> dict[str, float]:
        """By name."""
        return {f"{self.term}_right": self.right, f"{self.term}_wrong": self.wrong, "condition_gap": self.gap}


def blur(z: Tensor, noise: float) -> Tensor:
    """z (B, D) with up to ``noise`` of its standard deviations on it; as it is when ``noise`` is 0, without a draw."""
    if not noise:
        return z
    share = torch.rand(len(z), 1, device=z.device)
    return z + noise * share * z.detach().std(-1, keepdim=True) * torch.randn_like(z)


class Feedback(nn.Module):
    """Projectors, denoiser and the rectified-flow objective: (z, clean latent) -> loss per sample.

    Deviation: ``noise`` > 0 blurs the embedding by up to that many of its own standard deviations, a random share per
    sample (none in the paper). A small generator otherwise reads details from directions in which the embedding hardly
    varies; feedback then grows those directions, which the text tower doesn't know.
    """

    term: ClassVar[str] = "flow"

    def __init__(
        self, condition: GlobalCondition, denoiser: FluxDenoiser, *, times: TimeLaw, noise: float = 0.0
    ) -> None:
        super().__init__()
        self.condition: GlobalCondition = condition
        self.denoiser: FluxDenoiser = denoiser
        self.loss: FlowLoss = FlowLoss(times)
        self.noise = noise

    @property
    def times(self) -> TimeLaw:
        """The law of noise levels."""
        return self.loss.times

    @times.setter
    def times(self, law: TimeLaw) -> None:
        self.loss.times = law

    def forward(self, z: Tensor, x1: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Embedding z (B, D), clean latent x1 (B, N, C) -> losses (B,). Draws first t, then the noise."""
        t, x0 = self.loss.draw(x1, generator)
        return self.loss.at(self.denoiser, x1, self.condition(self.blurred(z)), t, x0)

    def blurred(self, z: Tensor) -> Tensor:
        """z (B, D) with noise on it; as it is when ``noise`` is 0, without a draw."""
        return blur(z, self.noise)

    @torch.no_grad()
    def condition_gap(self, z: Tensor, x1: Tensor, *, seed: int = 0) -> ConditionGap:
        """Does the generator listen? z (B, D), x1 (B, N, C); the gap is 0 for a single image."""
        t, x0 = self.loss.draw(x1, torch.Generator(x1.device).manual_seed(seed))
        told = self.condition(z)
        right, wrong = (self.loss.at(self.denoiser, x1, c, t, x0).mean() for c in (told, told.rolled()))
        return ConditionGap(right=float(right), wrong=float(wrong))
