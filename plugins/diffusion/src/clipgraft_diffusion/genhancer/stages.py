"""The two stages: teach a small generator to read CLIP's embedding, then teach CLIP to write what it needs.

Deviation: the text tower is never wrapped, decayed or saved anew; the export's text weights are the original bits.
Deviation: data are sharded over processes. The official code feeds all 8 processes the same images, so that its nominal
batch of 256 holds 32 distinct ones; give the budget in distinct images when you compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft.config.schema import TrainConfig
from clipgraft.data.base import Source
from clipgraft.encoders.base import Encoder
from clipgraft.stage import TrainStage
from clipgraft.types import Batch, FeatureRequest, ImageFeatures, StepOutput
from clipgraft_diffusion.anchor import Anchor
from clipgraft_diffusion.feedback import Feedback
from clipgraft_diffusion.latent import TokenLatent, VaeLatent

POOLED, TOKENS = FeatureRequest(), FeatureRequest(tokens=True)


class Target(nn.Module):
    """The untouched base and the latent made beside it, in one pass where both need it.

    ``shuffled`` gives every image another one's latent: the control that keeps everything but the correspondence.
    """

    def __init__(self, base: Encoder, latent: VaeLatent | TokenLatent, *, shuffled: bool = False) -> None:
        super().__init__()
        self.base, self.latent, self.shuffled = base, latent, shuffled
        self.shares = isinstance(latent, TokenLatent) and latent.tower is None

    @torch.no_grad()
    def embed(self, pixels: Tensor) -> ImageFeatures:
        """Pixels (B, 3, H, W') in [0, 1] -> the base's features, with tokens when the latent is made of them."""
        return self.base.image(self.base.preprocess.normalize(pixels), TOKENS if self.shares else POOLED)

    @torch.no_grad()
    def clean(self, pixels: Tensor, features: ImageFeatures | None) -> Tensor:
        """Pixels and, where the latent is made of the base's tokens, its features -> (B, N, C)."""
        if self.shares:
            assert isinstance(self.latent, TokenLatent) and features is not None
            x1 = self.latent.from_features(features)
        else:
            x1 = self.latent(pixels)
        return x1.roll(1, 0) if self.shuffled else x1


class GeneratorStage(TrainStage):
    """Stage 1: the base is frozen, projectors and denoiser learn."""

    def __init__(
        self,
        name: str,
        *,
        train: TrainConfig,
        source: Source,
        target: Target,
        feedback: Feedback,
        held_out: Tensor,
        crop: tuple[float, float] | None = (0.9, 1.0),
    ) -> None:
        super().__init__(name, train=train, source=source)
        self.training_crop = crop
        self.target, self.feedback = self.freeze(target), feedback
        self.register_buffer("held_out", held_out, persistent=False)

    def forward(self, batch: Batch) -> StepOutput:
        """One batch -> mean flow loss."""
        features = self.target.embed(batch.pixels)
        x1 = self.target.clean(batch.pixels, features)
        loss = self.feedback(features.pooled.float(), x1).mean()
        return StepOutput(loss, {"flow": loss.detach()}, len(batch))

    def components(self) -> dict[str, nn.Module]:
        """Denoiser, projectors and, for tokens, their statistics: all that stage 2 takes over."""
        found: dict[str, nn.Module] = {"denoiser": self.feedback.denoiser, "condition": self.feedback.condition}
        if isinstance(self.target.latent, TokenLatent):
            found["latent"] = self.target.latent.standardise
        return found

    def final_metrics(self) -> dict[str, float]:
        """Flow loss on held-out images with the right and with another image's embedding."""
        features = self.target.embed(self.held_out)
        if len(self.held_out) < 2:
            return {}
        gap = self.feedback.condition_gap(features.pooled.float(), self.target.clean(self.held_out, features))
        return {"flow_right": gap.right, "flow_wrong": gap.wrong, "condition_gap": gap.gap}


class ClipStage(TrainStage):
    """Stage 2: the image tower learns, by LoRA or fully; the generator is frozen (``only``) or learns along (``all``)."""

    def __init__(
        self,
        name: str,
        *,
        train: TrainConfig,
        source: Source,
        encoder: Encoder,
        target: Target,
        feedback: Feedback | None,
        anchor: Anchor | None,
        held_out: Tensor,
        train_generator: bool = False,
        generator_lr: float = 1.0,
        weight: float = 1.0,
        anchor_weight: float = 0.0,
        crop: tuple[float, float] | None = (0.9, 1.0),
    ) -> None:
        super().__init__(name, train=train, source=source)
        self.training_crop = crop
        self.encoder, self.target, self.anchor = encoder, self.freeze(target), anchor
        if encoder.text is not None:
            self.freeze(encoder.text)
        encoder.logit_scale.requires_grad_(False)
        if encoder.logit_bias is not None:
            encoder.logit_bias.requires_grad_(False)
        self.feedback = feedback if feedback is None or train_generator else self.freeze(feedback)
        self.generator_lr, self.weight, self.anchor_weight = generator_lr, weight, anchor_weight
        self.register_buffer("held_out", held_out, persistent=False)

    def forward(self, batch: Batch) -> StepOutput:
        """One batch -> weight * flow + anchor weight * anchor."""
        z = self.encoder.image(self.encoder.preprocess.normalize(batch.pixels)).pooled.float()  # (B, D)
        base = None
        if self.anchor is not None or (self.feedback is not None and self.target.shares):
            base = self.target.embed(batch.pixels)
        loss, terms = z.new_zeros(()), {}
        if self.feedback is not None:
            flow = self.feedback(z, self.target.clean(batch.pixels, base)).mean()
            loss, terms["flow"] = loss + self.weight * flow, flow.detach()
        if self.anchor is not None and base is not None:
            kept = self.anchor(z, base.pooled.float())
            loss, terms["anchor"] = loss + self.anchor_weight * kept, kept.detach()
        if base is not None:
            terms["cosine_to_base"] = F.cosine_similarity(z.detach(), base.pooled.float(), dim=-1).mean()
        return StepOutput(loss, terms, len(batch))

    def current_encoder(self) -> Encoder:
        """The encoder being trained."""
        return self.encoder

    def param_groups(self) -> list[dict[str, Any]]:
        """The tower, the generator with its own rate, and a learnt temperature."""
        parts: Sequence[tuple[str, nn.Module | None, float]] = (
            ("tower", self.encoder, 1.0),
            ("generator", self.feedback, self.generator_lr),
            ("anchor", self.anchor, 1.0),
        )
        groups = [
            {"name": name, "lr_scale": scale, "params": [p for p in part.parameters() if p.requires_grad]}
            for name, part, scale in parts
            if part is not None
        ]
        return [g for g in groups if g["params"]]

    @torch.no_grad()
    def final_metrics(self) -> dict[str, float]:
        """How far the tower moved: ||delta|| / ||theta|| of plain weights, and cosine to the base on held-out images."""
        base = self.target.embed(self.held_out).pooled.float()
        z = self.encoder.image(self.encoder.preprocess.normalize(self.held_out)).pooled.float()
        found = {
            "weight_drift": weight_drift(self.encoder, self.target.base),
            "cosine_to_base": float(F.cosine_similarity(z, base, dim=-1).mean()),
        }
        if self.feedback is not None and len(self.held_out) > 1:
            gap = self.feedback.condition_gap(z, self.target.clean(self.held_out, self.target.embed(self.held_out)))
            found |= {"flow_right": gap.right, "flow_wrong": gap.wrong, "condition_gap": gap.gap}
        return found


@torch.no_grad()
def weight_drift(encoder: Encoder, base: Encoder) -> float:
    """||theta - theta0|| / ||theta0|| over the image tower's plain weights; an adapted weight counts as its value.

    A run with a drift near 0 has not trained, whatever its scores say.
    """
    moved, size = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for name, start in base.image.named_parameters():
        owner, _, attribute = name.rpartition(".")
        now = getattr(encoder.image.get_submodule(owner), attribute)
        moved += (now.double() - start.double()).square().sum().cpu()
        size += start.double().square().sum().cpu()
    return float((moved / size).sqrt())
