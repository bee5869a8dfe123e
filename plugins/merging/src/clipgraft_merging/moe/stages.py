"""The two kinds of training of CLIP-MoE: feed-forward networks inside clusters, then gates over all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from clipgraft.config.schema import TrainConfig
from clipgraft.data.base import Source
from clipgraft.distributed import gather_with_grad
from clipgraft.encoders.base import Encoder
from clipgraft.losses.base import LossInputs
from clipgraft.stage import ContrastiveStage
from clipgraft.types import Batch, StepOutput, widened
from clipgraft_merging.moe.balance import Compat, balance, shares
from clipgraft_merging.moe.contrast import SmoothedClipLoss
from clipgraft_merging.moe.mixture import mixtures, routings


class PartlyTrained(ContrastiveStage):
    """A contrastive stage that trains ``trained`` of an encoder and nothing else; the temperature stays."""

    wants_text = True

    def __init__(
        self,
        name: str,
        *,
        train: TrainConfig,
        source: Source,
        encoder: Encoder,
        trained: Iterable[nn.Parameter],
        smoothing: float = 0.0,
    ) -> None:
        super().__init__(name, train=train, source=source)
        self.encoder = encoder.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        self.loss = SmoothedClipLoss(smoothing=smoothing)

    def encode(self, batch: Batch) -> tuple[Tensor, ...]:
        """Image and text embeddings, (b, D) each."""
        image, text = self.encoder(self.encoder.preprocess.normalize(batch.pixels), batch.text)
        assert image is not None and text is not None
        return widened(image.pooled), widened(text.pooled)

    def loss_from(self, features: tuple[Tensor, ...], batch: Batch) -> StepOutput:
        """The contrastive loss over the global batch."""
        found = self.loss(LossInputs(image=features[0], text=features[1], logit_scale=self.encoder.logit_scale.exp()))
        return StepOutput(found["loss"], {k: v for k, v in found.items() if k != "loss"}, len(batch))

    def current_encoder(self) -> Encoder:
        """The encoder being trained."""
        return self.encoder

    def trained_state(self) -> dict[str, Tensor]:
        """Only what is trained: the rest comes from the model that the run began with."""
        return {k: v for k, v in self.state_dict(keep_vars=True).items() if v.requires_grad}


class RouterStage(PartlyTrained):
    """Contrastive loss plus the weighted balance loss of every mixture."""

    def __init__(
        self,
        name: str,
        *,
        train: TrainConfig,
        source: Source,
        encoder: Encoder,
        trained: Iterable[nn.Parameter],
        smoothing: float = 0.0,
        weight: float = 0.01,
        compat: Compat = "paper",
    ) -> None:
        super().__init__(name, train=train, source=source, encoder=encoder, trained=trained, smoothing=smoothing)
        self.weight, self.compat = weight, compat
        self.towers = [t for t in ("image", "text") if mixtures(getattr(encoder, t))]

    def train(self, mode: bool = True) -> RouterStage:
        """As ever; mixtures with frozen gates or experts follow ``mode`` too, because their dropout asks for it."""
        super().train(mode)
        for mixture in mixtures(self.encoder).values():
            mixture.training = mode
        return self

    def encode(self, batch: Batch) -> tuple[Tensor, ...]:
        """Embeddings (b, D), then per tower with mixtures mean probabilities and shares of tokens, (b, M, E) each."""
        found, routed = [], []
        pixels, text = self.encoder.preprocess.normalize(batch.pixels), self.encoder.text
        assert text is not None and batch.text is not None
        for tower, value in ((self.encoder.image, pixels), (text, batch.text)):
            with routings(tower) as decisions:
                found.append(widened(tower(value).pooled))
            routed += shares(decisions, compat=self.compat) if decisions else ()
        return (*found, *routed)

    def loss_from(self, features: tuple[Tensor, ...], batch: Batch) -> StepOutput:
        """Shares are those of the global batch, so the loss doesn't depend on the number of processes.

        Deviation: the official code divides the balance loss by the number of processes on top of averaging.
        """
        output, routed = super().loss_from(features[:2], batch), list(features[2:])
        terms, total = dict(output.terms), output.loss.new_zeros(())
        pairs = zip(self.towers, routed[0::2], routed[1::2], strict=True)
        mixtures_of = {}
        for tower, probabilities, chosen in pairs:
            value = balance(gather_with_grad(probabilities), gather_with_grad(chosen), compat=self.compat)
            terms[f"balance_{tower}"], mixtures_of[tower] = value, probabilities.shape[1]
            total = total + value * (1 if self.compat == "official" else mixtures_of[tower])
        if self.compat == "paper":
            total = total / sum(mixtures_of.values())  # the mean over all mixtures of the model
        return StepOutput(output.loss + self.weight * total, {"contrast": output.loss, **terms}, len(batch))


def gates(encoder: Encoder) -> list[nn.Parameter]:
    """The gates' weights."""
    return [mixture.gate.weight for mixture in mixtures(encoder).values()]


def experts(encoder: Encoder) -> list[nn.Parameter]:
    """All experts' weights."""
    return [p for mixture in mixtures(encoder).values() for p in mixture.experts.parameters()]


def set_scale(encoder: Encoder, scale: float | None) -> Encoder:
    """Fix the inverse temperature; None leaves it."""
    if scale is not None:
        with torch.no_grad():
            encoder.logit_scale.fill_(math.log(scale))
    return encoder
