"""Masked prediction as feedback: hide most codes of an image, and ask which they were, given the rest and CLIP's word.

No code of the discrete denoiser was released. What the paper says is kept (ratio uniform in [.5, .9] per batch, cross
entropy on masked positions alone); everything else in this file is our reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft_diffusion.feedback import ConditionGap, blur
from clipgraft_diffusion.perceiver import Perceiver


@dataclass(frozen=True, slots=True)
class Mask:
    """Which positions of every sample are hidden: ``shown`` (B, L - M) and ``hidden`` (B, M), int64 positions."""

    shown: Tensor
    hidden: Tensor


@dataclass(frozen=True, slots=True)
class MaskLaw:
    """One ratio per batch, uniform in [low, high]; the positions are drawn anew for every sample."""

    low: float = 0.5
    high: float = 0.9

    def draw(
        self, size: int, length: int, *, device: torch.device | str = "cpu", generator: torch.Generator | None = None
    ) -> Mask:
        """A mask for ``size`` samples of ``length`` positions: round(ratio * length) hidden, at least one of each kind.

        Drawn on the CPU, so that a seed gives the same mask on every device and shapes need no synchronisation.
        """
        ratio = self.low + (self.high - self.low) * float(torch.rand((), generator=generator))
        hidden = min(max(round(ratio * length), 1), length - 1)
        order = torch.rand(size, length, generator=generator).argsort(1).to(device, non_blocking=True)
        return Mask(shown=order[:, hidden:], hidden=order[:, :hidden])


def masked_losses(logits: Tensor, indices: Tensor, mask: Mask) -> Tensor:
    """Mean cross entropy over the hidden positions: logits (B, M, K), indices (B, L) -> (B,) in fp32."""
    wanted = indices.gather(1, mask.hidden)
    return F.cross_entropy(logits.float().transpose(1, 2), wanted, reduction="none").mean(1)


class MaskedFeedback(nn.Module):
    """Projector, predictor and the masked objective: (z, indices) -> loss per sample.

    ``condition`` maps z (B, D) to the one token (B, m) that the predictor hears beside the codes it sees.
    Deviation: ``noise`` blurs the embedding as in ``Feedback``.
    """

    term: ClassVar[str] = "cross_entropy"

    def __init__(self, condition: nn.Module, denoiser: Perceiver, *, masks: MaskLaw, noise: float = 0.0) -> None:
        super().__init__()
        self.condition = condition
        self.denoiser: Perceiver = denoiser
        self.masks: MaskLaw = masks
        self.noise = noise

    def forward(self, z: Tensor, indices: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Embedding z (B, D), indices (B, L) -> losses (B,). Draws first the ratio, then the positions."""
        mask = self.masks.draw(*indices.shape, device=indices.device, generator=generator)
        return self._losses(self.condition(blur(z, self.noise)), indices, mask)

    def _losses(self, told: Tensor, indices: Tensor, mask: Mask) -> Tensor:
        logits = self.denoiser(self.denoiser.embed(indices), mask.shown, mask.hidden, told)
        return masked_losses(logits, indices, mask)

    @torch.no_grad()
    def condition_gap(self, z: Tensor, indices: Tensor, *, seed: int = 0) -> ConditionGap:
        """Does the predictor listen? z (B, D), indices (B, L), the same mask with right and wrong conditions."""
        mask = self.masks.draw(*indices.shape, device=indices.device, generator=torch.Generator().manual_seed(seed))
        told = self.condition(z)
        right, wrong = (float(self._losses(t, indices, mask).mean()) for t in (told, told.roll(1, 0)))
        return ConditionGap(right=right, wrong=wrong, term=self.term)
