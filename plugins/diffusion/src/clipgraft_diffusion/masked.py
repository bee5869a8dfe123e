"""Masked prediction as feedback: hide most codes of an image, and ask which they were, given the rest and CLIP's word.

No code of the discrete denoiser was released. What the paper says is kept (ratio uniform in [.5, .9] per batch, cross
entropy on masked positions alone); everything else in this file is our reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft_diffusion.eps import averaged
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


class CodePredictor(Protocol):
    """A model that names hidden codes; ``Perceiver`` is one."""

    def embed(self, indices: Tensor) -> Tensor:
        """Indices (B, L) -> embeddings (B, L, d)."""

    def __call__(self, embeddings: Tensor, shown: Tensor, hidden: Tensor, told: Any) -> Tensor:
        """Embeddings (B, L, d), positions shown (B, L - M) and hidden (B, M), condition -> logits (B, M, K)."""


class MaskedTokenLoss(nn.Module):
    """Mean cross entropy over hidden codes, per sample; masks from ``masks``, ``draws`` draws are averaged."""

    def __init__(self, masks: MaskLaw, *, draws: int = 1) -> None:
        super().__init__()
        self.masks: MaskLaw = masks
        self.draws = draws

    def draw(self, indices: Tensor, generator: torch.Generator | None = None) -> Mask:
        """A mask for indices (B, L): the ratio first, then the positions."""
        return self.masks.draw(*indices.shape, device=indices.device, generator=generator)

    def at(self, denoiser: CodePredictor, indices: Tensor, condition: Any, mask: Mask) -> Tensor:
        """Indices (B, L), condition and mask -> losses (B,)."""
        logits = denoiser(denoiser.embed(indices), mask.shown, mask.hidden, condition)
        return masked_losses(logits, indices, mask)

    def forward(
        self, denoiser: CodePredictor, indices: Tensor, condition: Any, generator: torch.Generator | None = None
    ) -> Tensor:
        """Indices (B, L) and their condition -> losses (B,); their mean is the objective."""
        return averaged(self.draws, lambda: self.at(denoiser, indices, condition, self.draw(indices, generator)))


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
        self.loss: MaskedTokenLoss = MaskedTokenLoss(masks)
        self.noise = noise

    def forward(self, z: Tensor, indices: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Embedding z (B, D), indices (B, L) -> losses (B,). Draws first the ratio, then the positions."""
        mask = self.loss.draw(indices, generator)
        return self.loss.at(self.denoiser, indices, self.condition(blur(z, self.noise)), mask)

    @torch.no_grad()
    def condition_gap(self, z: Tensor, indices: Tensor, *, seed: int = 0) -> ConditionGap:
        """Does the predictor listen? z (B, D), indices (B, L), the same mask with right and wrong conditions."""
        mask, told = self.loss.draw(indices, torch.Generator().manual_seed(seed)), self.condition(z)
        right, wrong = (float(self.loss.at(self.denoiser, indices, t, mask).mean()) for t in (told, told.roll(1, 0)))
        return ConditionGap(right=right, wrong=wrong, term=self.term)
