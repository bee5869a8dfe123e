"""DIVA's only stage: the image tower learns what a frozen generator needs to be told.

Shape legend: B batch, D joint embedding, L = 1 + K tokens of the recap, H x W' pixels; latents are (B, ...).
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
from clipgraft.log import RunLog
from clipgraft.stage import TrainStage
from clipgraft.types import Batch, FeatureRequest, ImageFeatures, StepOutput
from clipgraft_diffusion.anchor import Anchor
from clipgraft_diffusion.aside import set_aside
from clipgraft_diffusion.crops import CROP
from clipgraft_diffusion.drift import weight_drift
from clipgraft_diffusion.eps import EpsObjective
from clipgraft_diffusion.passes import Compat, Pass, pass_weights, several_passes
from clipgraft_diffusion.prompt import CrossCondition
from clipgraft_diffusion.recap import Recap, local_projection
from clipgraft_diffusion.recompute import recompute_blocks
from clipgraft_diffusion.remember import Remembered
from clipgraft_diffusion.store import LatentStore
from clipgraft_diffusion.unet import clip_pixels

POOLED, TOKENS = FeatureRequest(), FeatureRequest(tokens=True)
STILL = 1e-4
"""A relative movement of the weights below which scores can't have changed for the method's sake."""


@dataclass(frozen=True, slots=True)
class Critique:
    """The generator's side: which tokens it is told, how, and the objective that it judges by."""

    recap: Recap
    condition: CrossCondition
    objective: EpsObjective
    passes: int = 2
    compat: Compat = "fixed"
    shuffled: bool = False


class DivaStage(TrainStage):
    """Trains the image tower and the projection; generator, base and text tower are frozen.

    ``base`` is the untouched encoder. ``critique`` None leaves the anchor alone: the control that spends the same steps
    on nothing new. ``held_out`` are a few batches that are never trained on. ``crop`` None takes the evaluation
    transform; latents of unchanging pixels are kept with ``remember``, or come from ``latents`` on disk.
    ``checkpointing`` recomputes the tower's activations. ``log`` is told when the tower has not moved. Base and
    generator stay on their device: they are not among this module's own.
    """

    base: Encoder
    objective: EpsObjective | None

    def __init__(
        self,
        name: str,
        *,
        train: TrainConfig,
        source: Source,
        encoder: Encoder,
        base: Encoder,
        critique: Critique | None,
        anchor: Anchor | None = None,
        weight: float = 1.0,
        anchor_weight: float = 0.0,
        held_out: Sequence[Batch] = (),
        crop: tuple[float, float] | None = (0.9, 1.0),
        remember: bool = False,
        latents: LatentStore | None = None,
        checkpointing: bool = False,
        train_condition: bool = True,
        log: RunLog | None = None,
    ) -> None:
        super().__init__(name, train=train, source=source)
        self.training_crop = crop
        self.encoder: Encoder = encoder
        set_aside(self, "base", base)
        self.anchor: Anchor | None = anchor
        self.condition: CrossCondition | None = None if critique is None else critique.condition
        set_aside(self, "objective", None if critique is None else critique.objective)
        self.critique = critique
        encoder.requires_grad_(False)
        encoder.image.requires_grad_(True)
        for part in (base, encoder.text, self.objective, None if train_condition else self.condition):
            if part is not None:
                self.freeze(part)
        self.weight, self.anchor_weight, self.held_out, self.log = weight, anchor_weight, list(held_out), log
        self.local = local_projection(encoder.image)
        if checkpointing:
            recompute_blocks(encoder.image)
        self._remembered = latents if latents is not None else Remembered() if remember else None
        self._base_remembered = Remembered() if remember else None

    def forward(self, batch: Batch) -> StepOutput:
        """One batch -> weight * error of the noise + anchor weight * anchor."""
        features = self._see(self.encoder, batch)
        z = features.pooled.float()  # (B, D)
        loss, terms = z.new_zeros(()), {}
        if self.critique is not None:
            x0 = self._latents(batch)
            error = several_passes(self._passes(features, x0), weights=self._weights(), compat=self.critique.compat)
            loss, terms["noise"] = loss + self.weight * error, error.detach()
        if self.anchor is not None:
            seen = self._base_embedding(batch)
            kept = self.anchor(z, seen)
            loss, terms["anchor"] = loss + self.anchor_weight * kept, kept.detach()
            terms["cosine_to_base"] = F.cosine_similarity(z.detach(), seen, dim=-1).mean()
        return StepOutput(loss, terms, len(batch))

    def _passes(self, features: ImageFeatures, x0: Tensor) -> Iterator[tuple[Tensor, Pass]]:
        """Per pass its own steps, noise and local tokens, drawn in this order (official)."""
        assert self.critique is not None
        c = self.critique
        for _ in range(c.passes):
            t, noise = c.objective.draw(x0)
            told = c.condition(c.recap(features, project=self.local))  # (B, L, width)

            def run(condition: Tensor, t: Tensor = t, noise: Tensor = noise) -> Tensor:
                losses: Tensor = c.objective(x0, condition, t, noise)
                return losses.mean()

            yield told, run

    def _weights(self) -> list[float]:
        assert self.critique is not None
        return pass_weights(self.critique.passes, accumulate=self.train_config.accumulate, compat=self.critique.compat)

    def _see(self, encoder: Encoder, batch: Batch) -> ImageFeatures:
        compat: Compat = "fixed" if self.critique is None else self.critique.compat
        local = self.critique is not None and self.critique.recap.kind != "cls"
        pixels = clip_pixels(encoder.preprocess, batch.pixels, compat=compat)
        features: ImageFeatures = encoder.image(pixels, TOKENS if local else POOLED)
        return features

    @torch.no_grad()
    def _base_embedding(self, batch: Batch) -> Tensor:
        """What the untouched base says, (B, D) in fp32."""

        def compute() -> Tensor:
            return self._see(self.base, batch).pooled.float()

        return compute() if self._base_remembered is None else self._base_remembered(batch.ids, compute)

    def _latents(self, batch: Batch) -> Tensor:
        """The clean latents of a batch's crops, or of its pixels where the generator takes these; shuffled if asked."""
        assert self.critique is not None
        denoiser = self.critique.objective.denoiser

        def compute() -> Tensor:
            return denoiser.latents(_crops(batch))

        x0 = compute() if self._remembered is None else self._remembered(batch.ids, compute).to(batch.pixels.device)
        return x0.roll(1, 0) if self.critique.shuffled else x0

    def current_encoder(self) -> Encoder:
        """The encoder being trained."""
        return self.encoder

    def param_groups(self) -> list[dict[str, Any]]:
        """The tower, the projection, and a learnt temperature."""
        parts: list[tuple[str, nn.Module | None]] = [
            ("tower", self.encoder),
            ("condition", self.condition),
            ("anchor", self.anchor),
        ]
        groups = [
            {"name": name, "params": [p for p in part.parameters() if p.requires_grad]}
            for name, part in parts
            if part is not None
        ]
        return [group for group in groups if group["params"]]

    def components(self) -> dict[str, nn.Module]:
        """The projection, for who wants to go on."""
        return {} if self.condition is None else {"condition": self.condition}

    @torch.no_grad()
    def final_metrics(self) -> dict[str, float]:
        """How far the tower moved, and on held-out images: cosine to the base, error with the own condition and with

        another image's, same steps and noise, and its relative rise (0: the generator ignores what it is told).
        """
        found = {"weight_drift": weight_drift(self.encoder, self.base)}
        if self.log is not None and found["weight_drift"] < STILL:
            self.log.info(
                f"{self.name}: the image tower moved by {found['weight_drift']:.1e} of its norm, next to nothing; a "
                "change of its scores has other causes. Raise train.lr or train.steps"
            )
        cosines: list[tuple[Tensor, int]] = []
        right: list[tuple[Tensor, int]] = []
        wrong: list[tuple[Tensor, int]] = []
        device = next(self.encoder.parameters()).device
        generator = torch.Generator(device).manual_seed(0)
        for batch in (b.to(device) for b in self.held_out):
            features, size = self._see(self.encoder, batch), len(batch)
            cosines.append((F.cosine_similarity(features.pooled, self._see(self.base, batch).pooled).sum(), size))
            if self.critique is None or size < 2:
                continue
            c, draws = self.critique, torch.Generator().manual_seed(0)
            x0 = c.objective.denoiser.latents(_crops(batch))
            t, noise = c.objective.draw(x0, generator)
            told = c.condition(c.recap(features, project=self.local, generator=draws))
            for errors, condition in ((right, told), (wrong, told.roll(1, 0))):
                errors.append((c.objective(x0, condition, t, noise).sum(), size))
        for name, sums in (("cosine_to_base", cosines), ("noise_right", right), ("noise_wrong", wrong)):
            if sums:
                found[name] = float(sum(s for s, _ in sums) / sum(n for _, n in sums))
        return found | ({"condition_gap": found["noise_wrong"] / found["noise_right"] - 1} if right else {})


def _crops(batch: Batch) -> Tensor:
    """The pixels that the generator sees, (B, 3, H, W') in [0, 1]: the crops, or CLIP's own."""
    return batch.extra[CROP].float().div(255) if CROP in batch.extra else batch.pixels
