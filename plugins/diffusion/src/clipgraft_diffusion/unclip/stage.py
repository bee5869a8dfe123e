"""un2CLIP's stage: the image tower learns to write what a frozen decoder needs to restore the image.

Shape legend: B batch, D joint embedding, H x W' pixels; latents are (B, ...).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
from clipgraft_diffusion.crops import CROP
from clipgraft_diffusion.drift import weight_drift
from clipgraft_diffusion.eps import EpsObjective
from clipgraft_diffusion.passes import Pass, several_passes
from clipgraft_diffusion.recompute import recompute_blocks
from clipgraft_diffusion.remember import Remembered
from clipgraft_diffusion.store import LatentStore
from clipgraft_diffusion.unclip.label import UnclipLabel


class LabelTeller(nn.Module):
    """Tells a decoder that is being trained the labels of the frozen base's embeddings."""

    def __init__(self, label: UnclipLabel) -> None:
        super().__init__()
        self.label: UnclipLabel = label

    @torch.no_grad()
    def forward(self, batch: Batch, features: ImageFeatures) -> Tensor:
        """(B, 2D)."""
        told: Tensor = self.label(features.pooled)
        return told


@dataclass(frozen=True, slots=True)
class Inverter:
    """The decoder's side: what it is told, and the objective with the decoder in it."""

    label: UnclipLabel
    objective: EpsObjective
    passes: int = 1
    shuffled: bool = False


class Un2ClipStage(TrainStage):
    """Trains the image tower, whose trainable weights the caller chose; decoder, base and text tower are frozen.

    ``base`` is the untouched encoder. ``inverter`` None leaves the anchor alone: the control that spends the same steps
    on nothing new. ``held_out`` are a few batches that are never trained on. ``crop`` None takes the evaluation
    transform; latents and embeddings of unchanging pixels are kept with ``remember``, or latents come from ``latents``
    on disk. ``checkpointing`` recomputes the tower's activations. Base, decoder and label stay on their device: they
    are not among this module's own.
    """

    base: Encoder
    objective: EpsObjective | None
    label: UnclipLabel | None

    def __init__(
        self,
        name: str,
        *,
        train: TrainConfig,
        source: Source,
        encoder: Encoder,
        base: Encoder,
        inverter: Inverter | None,
        anchor: Anchor | None = None,
        weight: float = 1.0,
        anchor_weight: float = 0.0,
        held_out: Sequence[Batch] = (),
        crop: tuple[float, float] | None = (0.9, 1.0),
        remember: bool = False,
        latents: LatentStore | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__(name, train=train, source=source)
        self.training_crop = crop
        self.encoder: Encoder = encoder
        set_aside(self, "base", base)
        self.anchor: Anchor | None = anchor
        self.inverter = inverter
        set_aside(self, "objective", None if inverter is None else inverter.objective)
        set_aside(self, "label", None if inverter is None else inverter.label)
        for part in (base, encoder.text, self.objective, self.label):
            if part is not None:
                self.freeze(part)
        for scalar in (encoder.logit_scale, encoder.logit_bias):
            if scalar is not None:
                scalar.requires_grad_(False)
        self.weight, self.anchor_weight, self.held_out = weight, anchor_weight, list(held_out)
        if checkpointing:
            recompute_blocks(encoder.image)
        self._latents_kept = latents if latents is not None else Remembered() if remember else None
        self._base_kept = Remembered() if remember else None

    def forward(self, batch: Batch) -> StepOutput:
        """One batch -> weight * the decoder's error + anchor weight * anchor."""
        z = self._embed(self.encoder, batch)  # (B, D)
        loss, terms = z.new_zeros(()), {}
        if self.inverter is not None:
            weights = [1 / self.inverter.passes] * self.inverter.passes
            error = several_passes(self._passes(z, self._latents(batch)), weights=weights)
            loss, terms["error"] = loss + self.weight * error, error.detach()
        if self.anchor is not None:
            seen = self._base_embedding(batch)
            kept = self.anchor(z, seen)
            loss, terms["anchor"] = loss + self.anchor_weight * kept, kept.detach()
            terms["cosine_to_base"] = F.cosine_similarity(z.detach(), seen, dim=-1).mean()
        return StepOutput(loss, terms, len(batch))

    def _passes(self, z: Tensor, x0: Tensor) -> Iterator[tuple[Tensor, Pass]]:
        """Per pass its own steps, noise and label noise, drawn in this order."""
        assert self.inverter is not None
        c = self.inverter
        for _ in range(c.passes):
            t, noise = c.objective.draw(x0)
            told: Tensor = c.label(z)  # (B, 2D)

            def run(condition: Tensor, t: Tensor = t, noise: Tensor = noise) -> Tensor:
                losses: Tensor = c.objective(x0, condition, t, noise)
                return losses.mean()

            yield told, run

    @staticmethod
    def _embed(encoder: Encoder, batch: Batch) -> Tensor:
        """The projected embedding as it is, not normalised, (B, D) in fp32."""
        features: ImageFeatures = encoder.image(encoder.preprocess.normalize(batch.pixels))
        return features.pooled.float()

    @torch.no_grad()
    def _base_embedding(self, batch: Batch) -> Tensor:
        """What the untouched base says, (B, D) in fp32."""

        def compute() -> Tensor:
            return self._embed(self.base, batch)

        return compute() if self._base_kept is None else self._base_kept(batch.ids, compute)

    def _latents(self, batch: Batch) -> Tensor:
        """The clean latents of a batch's crops, or of its pixels where the decoder takes these; shuffled if asked."""
        assert self.inverter is not None
        denoiser = self.inverter.objective.denoiser

        def compute() -> Tensor:
            return denoiser.latents(_crops(batch))

        x0 = compute() if self._latents_kept is None else self._latents_kept(batch.ids, compute).to(batch.pixels.device)
        return x0.roll(1, 0) if self.inverter.shuffled else x0

    def current_encoder(self) -> Encoder:
        """The encoder being trained."""
        return self.encoder

    def param_groups(self) -> list[dict[str, Any]]:
        """The tower, and a learnt temperature."""
        parts: list[tuple[str, nn.Module | None]] = [("tower", self.encoder), ("anchor", self.anchor)]
        groups = [
            {"name": name, "params": [p for p in part.parameters() if p.requires_grad]}
            for name, part in parts
            if part is not None
        ]
        return [group for group in groups if group["params"]]

    @torch.no_grad()
    def final_metrics(self) -> dict[str, float]:
        """How far the tower moved; on held-out images cosine to the base, and the decoder's error told rightly and

        told about another image, at the same steps and noise, with its relative rise (0: it ignores what it is told).
        """
        found = {"weight_drift": weight_drift(self.encoder, self.base)}
        cosines: list[tuple[Tensor, int]] = []
        right: list[tuple[Tensor, int]] = []
        wrong: list[tuple[Tensor, int]] = []
        device = next(self.encoder.parameters()).device
        generator = torch.Generator(device).manual_seed(0)
        for batch in (b.to(device) for b in self.held_out):
            z, size = self._embed(self.encoder, batch), len(batch)
            cosines.append((F.cosine_similarity(z, self._embed(self.base, batch)).sum(), size))
            if self.inverter is None or size < 2:
                continue
            c = self.inverter
            x0 = c.objective.denoiser.latents(_crops(batch))
            t, noise = c.objective.draw(x0, generator)
            told = c.label(z, generator=generator)
            for errors, condition in ((right, told), (wrong, told.roll(1, 0))):
                errors.append((c.objective(x0, condition, t, noise).sum(), size))
        for name, sums in (("cosine_to_base", cosines), ("error_right", right), ("error_wrong", wrong)):
            if sums:
                found[name] = float(sum(s for s, _ in sums) / sum(n for _, n in sums))
        return found | ({"condition_gap": found["error_wrong"] / found["error_right"] - 1} if right else {})


def _crops(batch: Batch) -> Tensor:
    """The pixels that the decoder sees, (B, 3, H, W') in [0, 1]: the crops, or CLIP's own."""
    return batch.extra[CROP].float().div(255) if CROP in batch.extra else batch.pixels
