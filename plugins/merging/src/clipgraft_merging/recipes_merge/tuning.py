"""Fine-tuning one copy of a base, as an ingredient of a merge: on class names in words, or on captions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from clipgraft.config.schema import Config, LossNode, LossRef, TrainConfig
from clipgraft.data.base import Source
from clipgraft.encoders import apply_grafts
from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft.finetune import FinetuneStage
from clipgraft.runner import Run
from clipgraft.stage import StageResult, TrainStage
from clipgraft.types import Batch, StepOutput, widened


class TuningConfig(Config):
    """What a fine-tune of the base minimises."""

    objective: Literal["classes", "captions"] = Field(
        "classes", description="classes: the image tower against the class names in words, which stay; captions: losses"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="for classes")
    losses: tuple[LossRef, ...] = Field((LossNode(use="core/clip"),), min_length=1, description="for captions")
    crop: float | None = Field(0.9, gt=0, le=1, description="smallest area of the training crop; null takes none")


class ClassesStage(TrainStage):
    """The image tower against a classifier written in words, as FusionBench and WiSE-FT begin.

    Deviation: WiSE-FT trains the classifier too. Here it stays what the text tower says, so that the result is a CLIP.
    """

    def __init__(
        self,
        name: str,
        *,
        train: TrainConfig,
        source: Source,
        encoder: Encoder,
        classifier: Tensor,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(name, train=train, source=source)
        if encoder.text is not None:
            encoder.text.requires_grad_(False)
        for scalar in (encoder.logit_scale, encoder.logit_bias):
            if scalar is not None:
                scalar.requires_grad_(False)
        self.encoder, self.label_smoothing = encoder, label_smoothing
        self.register_buffer("classifier", classifier, persistent=False)  # (K, D) of length one

    def forward(self, batch: Batch) -> StepOutput:
        """Cross-entropy of scaled cosines to the classes."""
        if batch.labels is None:
            raise InputError(f"{self.source.name} has no labels; use data with classes, or objective: captions")
        image = self.encoder.image(self.encoder.preprocess.normalize(batch.pixels))
        logits = self.encoder.logit_scale.exp() * F.normalize(widened(image.pooled), dim=-1) @ self.classifier.T
        loss = F.cross_entropy(logits, batch.labels, label_smoothing=self.label_smoothing)
        right = (logits.detach().argmax(1) == batch.labels).float().mean()
        return StepOutput(loss, {"accuracy": right}, len(batch))

    def current_encoder(self) -> Encoder:
        """The encoder being trained."""
        return self.encoder


@dataclass(frozen=True, slots=True)
class Reseeded:
    """A stage whose data come in an order, and with crops, of their own."""

    stage: TrainStage
    seed: int

    @property
    def name(self) -> str:
        """The stage's."""
        return self.stage.name

    def run(self, run: Run) -> StageResult:
        """Train with another seed of the data than the run's."""
        held, run.seed = run.seed, self.seed
        try:
            return self.stage.run(run)
        finally:
            run.seed = held


def fresh_copy(run: Run) -> Encoder:
    """The base with the run's grafts, as the run's encoder: what the stage before left is out of the way."""
    run.encoder = apply_grafts(run.base_encoder(), run.config.grafts, registry=run.registry)
    return run.encoder


def fine_tune(
    run: Run, name: str, *, tuning: TuningConfig, train: TrainConfig, source: Source, order: int = 0
) -> Reseeded:
    """A stage that fine-tunes a fresh copy of the base on ``source``. ``order``: another order of the data."""
    encoder = fresh_copy(run)
    stage: TrainStage
    if tuning.objective == "classes":
        stage = ClassesStage(
            name,
            train=train,
            source=source,
            encoder=encoder,
            classifier=classifier_of(run, encoder, source),
            label_smoothing=tuning.label_smoothing,
        )
    else:
        losses = [run.registry.build("loss", node.use, node.settings) for node in tuning.losses]
        stage = FinetuneStage(
            name, train=train, source=source, encoder=encoder, losses=losses, weights=(1.0,) * len(losses)
        )
    stage.training_crop = None if tuning.crop is None else (tuning.crop, 1.0)
    if not any(p.requires_grad for p in stage.parameters()):
        raise InputError(
            "nothing is left to train: objective classes trains the image tower; take it out of core/freeze"
        )
    return Reseeded(stage, run.seed + 7919 * order)


def classifier_of(run: Run, encoder: Encoder, source: Source) -> Tensor:
    """(K, D) of length one, from the names and prompts of the data."""
    from clipgraft.evaluation.features import EncoderFeatures

    if len(source.classes) < 2:
        raise InputError(f"{source.name} has no classes to learn; use class folders, or objective: captions")
    with torch.random.fork_rng():
        return EncoderFeatures(encoder).classifier(source.classes, source.templates).to(run.device)
