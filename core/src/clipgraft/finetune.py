"""The plain recipe: train a CLIP on image-text pairs with the losses and grafts that a config lists."""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from clipgraft.config.schema import LossRef, RunConfig, TrainConfig
from clipgraft.data.base import Source
from clipgraft.encoders.base import Encoder
from clipgraft.losses.base import Loss, LossInputs
from clipgraft.recipe import StagePlan
from clipgraft.registry import Registry
from clipgraft.runner import Run
from clipgraft.stage import ContrastiveStage
from clipgraft.types import Batch, FeatureRequest, ImageFeatures, StepOutput, widened


class FinetuneConfig(RunConfig):
    """Settings of ``core/finetune``."""

    losses: tuple[LossRef, ...] = Field(min_length=1, description="losses by name; their weights are in loss_weights")
    loss_weights: tuple[Annotated[float, Field(gt=0)], ...] = Field((), description="one per loss; empty means all 1")
    teacher: str | None = Field(None, description="model reference for distillation losses; base: the untouched model")
    max_logit_scale: float = Field(100.0, gt=0, description="logit_scale is clamped to this after every step")
    train: TrainConfig


class Finetune:
    """One stage over the data's captions."""

    def __init__(self, config: FinetuneConfig) -> None:
        self.config = config

    def plan(self) -> list[StagePlan]:
        """One stage, ``train``."""
        return [StagePlan("train", self._build)]

    def check(self, run: Run) -> list[str]:
        """Weights that don't match the losses, and losses that judge something else than embeddings."""
        weights, losses = self.config.loss_weights, self.config.losses
        if weights and len(weights) != len(losses):
            return [f"loss_weights has {len(weights)} entries for {len(losses)} losses; give one per loss or none"]
        foreign = [n for n in losses if not isinstance(run.registry.build("loss", n.use, n.settings), Loss)]
        return [_refusal(run.registry, node.use) for node in foreign]

    def _build(self, run: Run) -> FinetuneStage:
        c = self.config
        teacher = None
        if c.teacher is not None:
            teacher = run.base_encoder() if c.teacher == "base" else run.open_encoder(c.teacher)
        return FinetuneStage(
            "train",
            train=c.train,
            source=run.train_source(),
            encoder=run.encoder,
            losses=[run.registry.build("loss", node.use, node.settings) for node in c.losses],
            weights=c.loss_weights or (1.0,) * len(c.losses),
            teacher=teacher,
            max_logit_scale=c.max_logit_scale,
        )


def _refusal(registry: Registry, name: str) -> str:
    """What to use instead of finetune for the loss ``name``."""
    loss = registry.get("loss", name)
    recipes = ", ".join(r.name for r in registry.list("recipe") if r.plugin == loss.plugin)
    way = f"run a recipe of its plugin: {recipes}" if recipes else "see: clipgraft list losses"
    return f"finetune judges embeddings, {loss.name} doesn't ({loss.component.summary}); {way}"


class FinetuneStage(ContrastiveStage):
    """Encoder, losses and maybe a frozen teacher."""

    wants_text = True

    def __init__(
        self,
        name: str,
        *,
        train: TrainConfig,
        source: Source,
        encoder: Encoder,
        losses: list[Loss],
        weights: tuple[float, ...],
        teacher: Encoder | None = None,
        max_logit_scale: float = 100.0,
    ) -> None:
        super().__init__(name, train=train, source=source)
        self.encoder, self.losses, self.weights = encoder, nn.ModuleList(losses), weights
        self.teacher = None if teacher is None else self.freeze(teacher)
        self.max_logit_scale = max_logit_scale
        self.want = FeatureRequest(tokens=any(loss.needs_tokens for loss in losses))
        if not any(loss.needs_scale for loss in losses):
            encoder.logit_scale.requires_grad_(False)
        if encoder.logit_bias is not None and not any(loss.needs_bias for loss in losses):
            encoder.logit_bias.requires_grad_(False)

    def encode(self, batch: Batch) -> tuple[Tensor, ...]:
        """Image, text and, with a teacher, teacher image and text embeddings (b, D); tokens (b, N, W) when needed."""
        features = self._features(self.encoder, batch)
        if self.teacher is not None:
            with torch.no_grad():
                features += self._features(self.teacher, batch)  # type: ignore[arg-type]
        return features

    def _features(self, encoder: Encoder, batch: Batch) -> tuple[Tensor, ...]:
        image, text = encoder(encoder.preprocess.normalize(batch.pixels), batch.text, self.want)
        assert isinstance(image, ImageFeatures) and text is not None
        tokens = () if image.tokens is None else (widened(image.tokens),)
        return (widened(image.pooled), widened(text.pooled), *tokens)

    def loss_from(self, features: tuple[Tensor, ...], batch: Batch) -> StepOutput:
        """Weighted sum of the losses' "loss" terms."""
        per = 3 if self.want.tokens else 2
        names = ("image", "text", "tokens")[:per]
        values: dict[str, Any] = dict(zip(names, features[:per], strict=True))
        values |= {f"teacher_{n}": f for n, f in zip(names, features[per:], strict=False)}
        bias = self.encoder.logit_bias
        inputs = LossInputs(logit_scale=self.encoder.logit_scale.exp(), logit_bias=bias, **values)
        total, terms = features[0].new_zeros(()), dict[str, Tensor]()
        for index, (loss, weight) in enumerate(zip(self.losses, self.weights, strict=True)):
            found = loss(inputs)
            total = total + weight * found["loss"]
            terms |= {f"{type(loss).__name__}.{index}.{k}": v for k, v in found.items()}
        return StepOutput(total, terms, len(batch))

    def current_encoder(self) -> Encoder:
        """The encoder being trained."""
        return self.encoder

    def after_update(self, step: int) -> None:
        """Keep the logit scale in [1, max_logit_scale] (Radford et al. 2021, section 2.5, clip at 100)."""
        with torch.no_grad():
            self.encoder.logit_scale.clamp_(0, math.log(self.max_logit_scale))
