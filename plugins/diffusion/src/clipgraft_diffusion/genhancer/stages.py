"""The two stages: teach a small generator to read CLIP's embedding, then teach CLIP to write what it needs.

Deviation: the text tower is never wrapped, decayed or saved anew; the export's text weights are the original bits.
Deviation: data are sharded over processes. The official code feeds all 8 processes the same images, so that its nominal
batch of 256 holds 32 distinct ones; give the budget in distinct images when you compare.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft.config.schema import TrainConfig
from clipgraft.data.base import Source
from clipgraft.encoders.base import Encoder
from clipgraft.stage import TrainStage
from clipgraft.types import Batch, ImageFeatures, StepOutput
from clipgraft_diffusion.anchor import Anchor
from clipgraft_diffusion.aside import set_aside
from clipgraft_diffusion.drift import weight_drift
from clipgraft_diffusion.feedback import Feedback
from clipgraft_diffusion.masked import MaskedFeedback
from clipgraft_diffusion.recompute import recompute_blocks
from clipgraft_diffusion.target import Seen, Target

AnyFeedback = Feedback | MaskedFeedback
"""The continuous denoiser's verdict, or the discrete one's."""


class GeneratorStage(TrainStage):
    """Stage 1: the base is frozen, projectors and denoiser learn. ``held_out`` (k, 3, H, W') pixels measure the end.

    ``target`` and ``held_out`` stay on their device: they are not among this module's own.
    """

    target: Target

    def __init__(
        self,
        name: str,
        *,
        train: TrainConfig,
        source: Source,
        target: Target,
        feedback: AnyFeedback,
        held_out: Tensor,
        crop: tuple[float, float] | None = (0.9, 1.0),
    ) -> None:
        super().__init__(name, train=train, source=source)
        self.training_crop = crop
        set_aside(self, "target", target)
        self.feedback: AnyFeedback = feedback
        self.freeze(target)
        self.held_out = held_out

    def forward(self, batch: Batch) -> StepOutput:
        """One batch -> mean loss of the generator."""
        seen: Seen = self.target(batch)
        loss = self.feedback(seen.z, seen.x1).mean()
        return StepOutput(loss, {self.feedback.term: loss.detach()}, len(batch))

    def components(self) -> dict[str, nn.Module]:
        """Denoiser, projectors and what was fitted to the images (statistics, codes): all that stage 2 takes over."""
        found: dict[str, nn.Module] = {"denoiser": self.feedback.denoiser, "condition": self.feedback.condition}
        fitted = None if self.target.latent is None else self.target.latent.fitted()
        if fitted is not None:
            found["latent"] = fitted
        return found

    def final_metrics(self) -> dict[str, float]:
        """The loss on held-out images with their own and with another image's embedding."""
        seen = self.target.look(self.held_out)
        return self.feedback.condition_gap(seen.z, seen.x1).metrics()


class ClipStage(TrainStage):
    """Stage 2: the image tower learns, by LoRA or fully; the generator is frozen or learns along.

    Without ``feedback`` only the anchor acts: the control that spends the same steps on nothing new. ``checkpointing``
    recomputes the tower's activations. What is frozen stays on its device: it is not among this module's own.
    """

    target: Target
    feedback: AnyFeedback | None

    def __init__(
        self,
        name: str,
        *,
        train: TrainConfig,
        source: Source,
        encoder: Encoder,
        target: Target,
        feedback: AnyFeedback | None,
        anchor: Anchor | None,
        held_out: Tensor,
        train_generator: bool = False,
        generator_lr: float = 1.0,
        weight: float = 1.0,
        anchor_weight: float = 0.0,
        crop: tuple[float, float] | None = (0.9, 1.0),
        checkpointing: bool = False,
    ) -> None:
        super().__init__(name, train=train, source=source)
        self.training_crop = crop
        self.encoder: Encoder = encoder
        set_aside(self, "target", target)
        if train_generator:
            self.feedback = feedback
        else:
            set_aside(self, "feedback", feedback)
        if checkpointing:
            recompute_blocks(encoder.image)
        self.anchor: Anchor | None = anchor
        for part in (target, encoder.text, None if train_generator else feedback):
            if part is not None:
                self.freeze(part)
        encoder.logit_scale.requires_grad_(False)
        if encoder.logit_bias is not None:
            encoder.logit_bias.requires_grad_(False)
        self.generator_lr, self.weight, self.anchor_weight = generator_lr, weight, anchor_weight
        self.held_out = held_out

    def forward(self, batch: Batch) -> StepOutput:
        """One batch -> weight * feedback + anchor weight * anchor."""
        z, seen = self._embed(batch.pixels), self.target(batch)  # (B, D)
        loss = z.new_zeros(())
        terms = {"cosine_to_base": F.cosine_similarity(z.detach(), seen.z, dim=-1).mean()}
        if self.feedback is not None:
            told = self.feedback(z, seen.x1).mean()
            loss, terms[self.feedback.term] = loss + self.weight * told, told.detach()
        if self.anchor is not None:
            kept = self.anchor(z, seen.z)
            loss, terms["anchor"] = loss + self.anchor_weight * kept, kept.detach()
        return StepOutput(loss, terms, len(batch))

    def _embed(self, pixels: Tensor) -> Tensor:
        features: ImageFeatures = self.encoder.image(self.encoder.preprocess.normalize(pixels))
        return features.pooled.float()

    def current_encoder(self) -> Encoder:
        """The encoder being trained."""
        return self.encoder

    def param_groups(self) -> list[dict[str, Any]]:
        """The tower, the generator with its own rate, and a learnt temperature."""
        parts: list[tuple[str, nn.Module | None, float]] = [
            ("tower", self.encoder, 1.0),
            ("generator", self.feedback, self.generator_lr),
            ("anchor", self.anchor, 1.0),
        ]
        groups = [
            {"name": name, "lr_scale": scale, "params": [p for p in part.parameters() if p.requires_grad]}
            for name, part, scale in parts
            if part is not None
        ]
        return [group for group in groups if group["params"]]

    @torch.no_grad()
    def final_metrics(self) -> dict[str, float]:
        """How far the tower moved: ||delta|| / ||theta|| of its weights, and cosine to the base on held-out images."""
        z, seen = self._embed(self.held_out), self.target.look(self.held_out)
        found = {
            "weight_drift": weight_drift(self.encoder, self.target.base),
            "cosine_to_base": float(F.cosine_similarity(z, seen.z, dim=-1).mean()),
        }
        return found | ({} if self.feedback is None else self.feedback.condition_gap(z, seen.x1).metrics())
