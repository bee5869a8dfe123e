"""The words that pixels are compared with: classes, and perhaps what is none of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from clipgraft.config.schema import Config
from clipgraft.data.base import Source
from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.evaluation.templates import class_names, prompt_templates

Background = Literal["none", "threshold", "class"]


class VocabularyConfig(Config):
    """How pixels become words."""

    classes: str | tuple[str, ...] = Field(
        (), description="names of the classes of the masks, or file:FILE; empty takes those of the data"
    )
    templates: str | tuple[str, ...] = Field(
        (), description="prompts with one {}, file:FILE, openai-imagenet or simple; empty takes those of the data"
    )
    background: Background = Field(
        "none",
        description="none leaves background pixels out; threshold calls a pixel background below a probability; class "
        "gives background its own words",
    )
    threshold: float = Field(0.5, ge=0, le=1, description="for threshold: of the largest probability over classes")
    background_names: tuple[str, ...] = Field(
        ("background",), min_length=1, description="for class: words for what is no class; the best of them counts"
    )

    @model_validator(mode="after")
    def _names_are_names(self) -> VocabularyConfig:
        if any(not name.strip() for name in self.background_names):
            raise ValueError("background_names holds an empty name; remove it")
        return self

    def vocabulary(self, features: EncoderFeatures, source: Source) -> Vocabulary:
        """The vocabulary of an encoder for the masks of a source."""
        names = segment_names(source, self.classes)
        templates = prompt_templates(self.templates) or source.templates
        texts = list(names) + (list(self.background_names) if self.background == "class" else [])
        return Vocabulary(
            names,
            features.classifier(texts, templates),
            scale=temperature(features.encoder),
            background=self.background,
            threshold=self.threshold,
        )


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """``words`` (K' , D) of length one: K classes, then words for background; ``scale`` is the inverse temperature."""

    names: tuple[str, ...]
    words: Tensor
    scale: float
    background: Background
    threshold: float

    @property
    def labels(self) -> dict[int, str]:
        """Labels that count -> names."""
        classes = {1 + k: name for k, name in enumerate(self.names)}
        return classes if self.background == "none" else {0: "background"} | classes

    def scores(self, maps: Tensor) -> Tensor:
        """Patch embeddings (B, D, h, w) -> cosines (B, K or 1 + K, h, w), background first where it has words."""
        cosines = torch.einsum("bdhw,kd->bkhw", torch.nn.functional.normalize(maps.float(), dim=1), self.words.to(maps))
        k = len(self.names)
        if self.background != "class":
            return cosines
        return torch.cat([cosines[:, k:].amax(1, keepdim=True), cosines[:, :k]], 1)

    def probabilities(self, scores: Tensor) -> Tensor:
        """Cosines (B, K or 1 + K, H, W') -> softmax over them."""
        return (scores * self.scale).softmax(1)

    def decide(self, scores: Tensor) -> Tensor:
        """Cosines (B, K or 1 + K, H, W') -> labels (B, H, W'), 0 for background."""
        if self.background == "class":
            return scores.argmax(1)
        best = scores.argmax(1) + 1
        if self.background == "none":
            return best
        return torch.where(self.probabilities(scores).amax(1) < self.threshold, 0, best)

    def truth(self, semantics: Tensor, *, ignore: int) -> Tensor:
        """The masks' labels with background ignored where it doesn't count."""
        return semantics.masked_fill(semantics == 0, ignore) if self.background == "none" else semantics


def segment_names(source: Source, given: str | Sequence[str] = ()) -> tuple[str, ...]:
    """Names of labels 1, 2, ... of a source's masks: as given, or what the source calls ``segments``."""
    own: Any = getattr(source, "segments", ())
    if not own and not given:
        raise InputError(
            f"{source.name} doesn't say what its masks show; give classes, in the order of the labels from 1 on"
        )
    if not own:
        return class_names(given, tuple(given) if not isinstance(given, str) else (), source=source.name)
    return class_names(given, tuple(own), source=source.name)


def temperature(encoder: Encoder) -> float:
    """The inverse temperature of an encoder's probabilities."""
    return float(encoder.logit_scale.detach().float().exp())
