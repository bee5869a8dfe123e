"""SDS-CLIP's stages: the map alone with CLIP frozen, then CLIP's layer norms and the map.

Shape legend: B batch, D joint embedding, L text ids; latents are (B, *latent).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft.config.schema import TrainConfig
from clipgraft.data.base import Source
from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft.losses.base import LossInputs
from clipgraft.losses.contrastive import ClipLoss
from clipgraft.stage import ContrastiveStage, TrainStage
from clipgraft.types import Batch, FeatureRequest, ImageFeatures, StepOutput, widened
from clipgraft_diffusion.aside import set_aside
from clipgraft_diffusion.drift import weight_drift
from clipgraft_diffusion.remember import Remembered
from clipgraft_diffusion.sds.captions import other_ids, refuse_strangers
from clipgraft_diffusion.sds.loss import SdsLoss
from clipgraft_diffusion.sds.mapper import LatentMapper, size
from clipgraft_diffusion.sds.told import Told

POOLED = FeatureRequest()
TOLD = 2**28
"""Bytes of captions' states that are kept: a thousand of Stable Diffusion's, all of a miniature's."""
WarmupOn = Literal["image", "text", "both"]


@dataclass(frozen=True, slots=True)
class Distillation:
    """The generator's side: the map, the loss, and the frozen model that is told captions.

    ``shuffled`` tells it another image's caption: the control whose feedback says nothing about this one.
    """

    mapper: LatentMapper
    loss: SdsLoss
    teacher: Told
    shuffled: bool = False


def layer_norms(module: nn.Module) -> list[nn.Parameter]:
    """Weights and biases of the layer norms in ``module``."""
    norms = [m for m in module.modules() if isinstance(m, nn.LayerNorm)]
    return [p for norm in norms for p in (norm.weight, norm.bias) if p is not None]


def make_trainable(encoder: Encoder, trainable: Literal["layer-norms", "all", "given"]) -> None:
    """Set what is trained; ``given`` keeps what grafts chose. Refuses layer norms alone where the image tower has none.

    The feedback reaches CLIP through the image tower: without a norm there it would change nothing.
    """
    if trainable == "given":
        if not any(p.requires_grad for p in encoder.image.parameters()):
            raise InputError("trainable given: the grafts left nothing to train in the image tower; keep some of it")
        return
    encoder.requires_grad_(trainable == "all")
    if trainable == "all":
        if encoder.logit_bias is not None:
            encoder.logit_bias.requires_grad_(False)
        return
    if not layer_norms(encoder.image):
        raise InputError(
            "trainable layer-norms: this image tower has none (a ResNet), so the generator's feedback could change "
            "nothing; choose a ViT or set trainable to all"
        )
    for p in layer_norms(encoder):
        p.requires_grad_(True)


class Critic:
    """Asks the generator about embeddings: what the two stages share. Captions' states are remembered."""

    def __init__(self, distillation: Distillation) -> None:
        self.parts = distillation
        self._told = Remembered(memory=TOLD)
        self._checked = False

    def told(self, batch: Batch) -> Tensor:
        """The condition (B, ...) of a batch's captions; rolled in the control arm."""
        teacher = self.parts.teacher
        assert batch.text is not None
        if teacher.read is not None and not self._checked:
            refuse_strangers(batch)
            self._checked = True
        ids = batch.text if teacher.read is None else other_ids(batch)
        names = [str(row) for row in ids.tolist()]
        condition = self._told(names, lambda: teacher.tell(ids))
        return condition.roll(1, 0) if self.parts.shuffled else condition

    def losses(self, z: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Embeddings (B, D) -> distillation losses (B,), log size of the mapped latents (B,)."""
        u = self.parts.mapper(z)
        return self.parts.loss(self.parts.teacher, u, self.told(batch)), size(u)

    @torch.no_grad()
    def gap(self, batches: Sequence[tuple[Tensor, Batch]]) -> dict[str, float]:
        """(embeddings, batch) of held-out images -> loss with the own and with another caption, and its relative rise.

        Same steps and noise for both; 0 means that the mapped latent has nothing to do with the caption.
        """
        sums, sizes, count = [0.0, 0.0], 0.0, 0
        for z, batch in batches:
            if len(batch) < 2:
                continue
            u, p = self.parts.mapper(z), self.parts
            drawn = p.loss.draw(u, torch.Generator(u.device).manual_seed(count))
            told = self.told(batch)
            for k, condition in enumerate((told, told.roll(1, 0))):
                sums[k] += float(p.loss.at(p.teacher, u, condition, *drawn).sum())
            sizes, count = sizes + float(size(u).sum()), count + len(batch)
        if not count:
            return {}
        right, wrong = sums[0] / count, sums[1] / count
        return {"sds_right": right, "sds_wrong": wrong, "caption_gap": wrong / right - 1, "latent": sizes / count}


def seen(encoder: Encoder, batch: Batch) -> Tensor:
    """The image embedding (B, D), not normalised, fp32."""
    features: ImageFeatures = encoder.image(encoder.preprocess.normalize(batch.pixels), POOLED)
    return widened(features.pooled)


def freeze_teacher(stage: TrainStage, distillation: Distillation) -> None:
    """The generator and the loss's schedule: frozen, and no part of the stage, whose wrapper would broadcast them."""
    for part in (distillation.teacher, distillation.loss):
        if isinstance(part, nn.Module):
            stage.freeze(part)


class MapperStage(TrainStage):
    """Trains the map alone; CLIP and generator are frozen.

    Deviation: ``on`` may be the captions' own embeddings ("text") or half of the batch each ("both"), so that the map
    knows how CLIP's texts say what the generator expects; the next stage then asks images to say it in the same way.
    """

    wants_text = True

    def __init__(
        self,
        name: str,
        *,
        train: TrainConfig,
        source: Source,
        encoder: Encoder,
        distillation: Distillation,
        on: WarmupOn = "image",
        held_out: Sequence[Batch] = (),
        crop: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(name, train=train, source=source)
        self.training_crop = crop
        self.on: WarmupOn = on
        self.encoder: Encoder
        set_aside(self, "encoder", self.freeze(encoder))
        self.mapper: LatentMapper = distillation.mapper
        freeze_teacher(self, distillation)
        self.critic, self.held_out = Critic(distillation), list(held_out)
        self._seen = Remembered() if crop is None else None

    def forward(self, batch: Batch) -> StepOutput:
        """One batch -> mean distillation loss."""
        losses, latent = self.critic.losses(self._embedding(batch), batch)
        loss = losses.mean()
        return StepOutput(loss, {"sds": loss.detach(), "latent": latent.mean()}, len(batch))

    @torch.no_grad()
    def _embedding(self, batch: Batch) -> Tensor:
        """(B, D) of images, of captions, or of captions in the second half."""
        first = {"image": len(batch), "text": 0, "both": (len(batch) + 1) // 2}[self.on]
        rows = [self._image(batch[slice(0, first)])] if first else []
        if first < len(batch):
            assert self.encoder.text is not None and batch.text is not None
            rows.append(widened(self.encoder.text(batch.text[first:]).pooled))
        return torch.cat(rows)

    def _image(self, batch: Batch) -> Tensor:
        if self._seen is None:
            return seen(self.encoder, batch)
        return self._seen(batch.ids, lambda: seen(self.encoder, batch))

    def components(self) -> dict[str, nn.Module]:
        """``mapper``, for the next stage."""
        return {"mapper": self.mapper}

    @torch.no_grad()
    def final_metrics(self) -> dict[str, float]:
        """As ``Critic.gap``."""
        device = next(self.mapper.parameters()).device
        return self.critic.gap([(seen(self.encoder, b), b) for b in (b.to(device) for b in self.held_out)])


class SdsStage(ContrastiveStage):
    """Symmetric InfoNCE over the global batch + weight * distillation; what is trained is set before.

    ``distillation`` None leaves the contrastive loss alone, bit for bit. The distillation losses are features of the
    chunk that made them, so that accumulation is exact for both.
    """

    wants_text = True

    def __init__(
        self,
        name: str,
        *,
        train: TrainConfig,
        source: Source,
        encoder: Encoder,
        base: Encoder,
        distillation: Distillation | None,
        weight: float,
        contrastive: float = 1.0,
        train_mapper: bool = True,
        mapper_lr: float = 1.0,
        max_logit_scale: float = 100.0,
        held_out: Sequence[Batch] = (),
        crop: tuple[float, float] | None = (0.9, 1.0),
    ) -> None:
        super().__init__(name, train=train, source=source)
        self.training_crop = crop
        self.encoder: Encoder = encoder
        self.base: Encoder
        set_aside(self, "base", self.freeze(base))
        if contrastive == 0:
            encoder.logit_scale.requires_grad_(False)
            if encoder.text is not None:
                encoder.text.requires_grad_(False)
        self.mapper: LatentMapper | None = None if distillation is None else distillation.mapper
        self.critic = None if distillation is None else Critic(distillation)
        if distillation is not None:
            freeze_teacher(self, distillation)
            if not train_mapper:
                self.freeze(distillation.mapper)
        self.infonce = ClipLoss()
        self.weight, self.contrastive, self.mapper_lr = weight, contrastive, mapper_lr
        self.max_logit_scale, self.held_out = max_logit_scale, list(held_out)

    def encode(self, batch: Batch) -> tuple[Tensor, ...]:
        """Image and text embeddings (b, D); with a generator also distillation losses and log sizes of latents (b,)."""
        assert self.encoder.text is not None and batch.text is not None
        z, text = seen(self.encoder, batch), widened(self.encoder.text(batch.text).pooled)
        return (z, text) if self.critic is None else (z, text, *self.critic.losses(z, batch))

    def loss_from(self, features: tuple[Tensor, ...], batch: Batch) -> StepOutput:
        """contrastive * InfoNCE + weight * mean distillation loss."""
        image, text, *more = features
        loss, terms = image.new_zeros(()), dict[str, Tensor]()
        if self.contrastive:
            found = self.infonce(LossInputs(image=image, text=text, logit_scale=self.encoder.logit_scale.exp()))
            loss = self.contrastive * found["loss"]
            terms = {"contrastive": found["loss"].detach()}
        if more:
            sds = more[0].mean()
            loss = loss + self.weight * sds
            terms |= {"sds": sds.detach(), "latent": more[1].mean()}
        return StepOutput(loss, terms, len(batch))

    def current_encoder(self) -> Encoder:
        """The encoder being trained."""
        return self.encoder

    def param_groups(self) -> list[dict[str, Any]]:
        """CLIP's part, and the map."""
        clip = [p for p in self.encoder.parameters() if p.requires_grad]
        own = [] if self.mapper is None else [p for p in self.mapper.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [{"name": "clip", "params": clip}]
        groups += [{"name": "mapper", "params": own, "lr_scale": self.mapper_lr}] if own else []
        return groups

    def after_update(self, step: int) -> None:
        """Keep a trained logit scale in [1, max_logit_scale]."""
        if self.encoder.logit_scale.requires_grad:
            with torch.no_grad():
                self.encoder.logit_scale.clamp_(0, torch.tensor(self.max_logit_scale).log().item())

    def components(self) -> dict[str, nn.Module]:
        """The map, for who wants to go on; it is no part of the export."""
        return {} if self.mapper is None else {"mapper": self.mapper}

    @torch.no_grad()
    def final_metrics(self) -> dict[str, float]:
        """How far both towers moved, cosine to the base on held-out images, and ``Critic.gap`` on them."""
        found = {
            "weight_drift": weight_drift(self.encoder, self.base),
            "text_weight_drift": weight_drift(self.encoder, self.base, tower="text"),
        }
        device, rows = next(self.encoder.parameters()).device, list[tuple[Tensor, Batch]]()
        cosines = list[Tensor]()
        for batch in (b.to(device) for b in self.held_out):
            z = seen(self.encoder, batch)
            cosines.append(F.cosine_similarity(z, seen(self.base, batch)))
            rows.append((z, batch))
        if cosines:
            found["cosine_to_base"] = float(torch.cat(cosines).mean())
        return found | ({} if self.critic is None else self.critic.gap(rows))
