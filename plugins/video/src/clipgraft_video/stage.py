"""Training a video model: clips from the loader, one forward of encoder and head, scores for texts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft.config.schema import TrainConfig
from clipgraft.data.base import Source
from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft.stage import TrainStage
from clipgraft.types import Batch, StepOutput
from clipgraft_video.heads import VideoFeatures
from clipgraft_video.mixing import Mixing, soft_cross_entropy, targets_of
from clipgraft_video.model import VideoModel
from clipgraft_video.objectives import caption_contrast, label_contrast

Objective = Literal["classes", "labels", "captions"]


@dataclass(frozen=True, slots=True)
class Seen:
    """What one step saw, for further parts of the loss.

    ``video``, ``texts`` (K, D) and the ``chosen`` words behind them (empty for captions), ``clips`` (B, T, 3, S, S) in
    [0, 1] after mixing, ``batch``.
    """

    video: VideoFeatures
    texts: Tensor | None
    chosen: tuple[str, ...]
    clips: Tensor
    batch: Batch


class VideoStage(TrainStage):
    """Trains ``model`` for an objective.

    ``classes``: cross entropy over the texts of all K classes (ViFi-CLIP, X-CLIP, FROSTER); ``labels``: contrast inside
    the batch, where videos of one class are all right (EZ-CLIP); ``captions``: contrast with one caption per video.
    ``prompts`` are the texts per class; with several, each step draws one. ``weight`` is the objective's share of the
    loss; ``terms`` {name: (weight, module)} add to it; a module maps ``Seen`` to scalars by name, "loss" among them. A
    text tower without trainable parameters is read once and kept.
    """

    def __init__(
        self,
        name: str,
        *,
        train: TrainConfig,
        source: Source,
        model: VideoModel,
        objective: Objective = "classes",
        prompts: Sequence[Sequence[str]] = (),
        smoothing: float = 0.0,
        mixing: Mixing | None = None,
        weight: float = 1.0,
        terms: Mapping[str, tuple[float, nn.Module]] | None = None,
        groups: Sequence[Mapping[str, Any]] = (),
        max_logit_scale: float | None = None,
    ) -> None:
        super().__init__(name, train=train, source=source)
        self.batch_coupled = objective != "classes"
        self.training_crop = None  # clips are cropped by their source
        self.wants_text = objective == "captions"
        self.model, self.objective, self.prompts = model, objective, [list(texts) for texts in prompts]
        self.smoothing, self.mixing, self.groups = smoothing, mixing or Mixing(), list(groups)
        self.terms = nn.ModuleDict({key: module for key, (_, module) in (terms or {}).items()})
        self.weight = weight
        self.weights = {key: weight for key, (weight, _) in (terms or {}).items()}
        self.max_logit_scale = max_logit_scale
        self._kept: Tensor | None = None
        if objective != "captions" and len(self.prompts) < 2:
            raise InputError(f"{source.name} names {len(self.prompts)} classes; training on classes needs two or more")

    def forward(self, batch: Batch) -> StepOutput:
        """One batch of clips -> loss."""
        if "frames" not in batch.extra:
            raise InputError(f"{self.source.name} holds pictures, no videos; use video:DIR or video:LIST")
        clips = batch.extra["frames"].float() / 255
        loss, terms, seen = self._objective(clips, batch)
        loss = loss if self.weight == 1 else self.weight * loss
        for name, term in self.terms.items():
            found = term(seen)
            loss = loss + self.weights[name] * found["loss"]
            terms |= {f"{name}.{key}": value.detach() for key, value in found.items()}
        return StepOutput(loss, terms, len(batch))

    def _objective(self, clips: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Seen]:
        if self.objective == "captions":
            assert batch.text is not None
            video = self.model(clips)
            _, text = self.model.encoder(text=batch.text)
            scale = self.model.encoder.logit_scale.exp()
            with torch.autocast(clips.device.type, enabled=False):
                loss = caption_contrast(video.unit().float(), F.normalize(text.pooled.float(), dim=-1), scale)
            return loss, {"captions": loss.detach()}, Seen(video, None, (), clips, batch)
        if batch.labels is None:
            raise InputError(f"{self.source.name} has videos without labels; give a list with labels, or class folders")
        chosen, labels = self._chosen(), batch.labels
        texts = self.texts(chosen)
        if self.objective == "labels":
            video = self.model(clips)
            logits = self.model.logits(video, texts)
            unit = F.normalize(texts, dim=-1)
            loss = label_contrast(video.unit(), unit, labels, scale=self.model.encoder.logit_scale.exp())
        else:
            clips, targets = self.mixing(clips, targets_of(labels, len(texts), smoothing=self.smoothing))
            video = self.model(clips)
            logits = self.model.logits(video, texts)
            loss = soft_cross_entropy(logits, targets)
        right = (logits.argmax(-1) == labels).float().mean()
        parts = {self.objective: loss.detach(), "accuracy": right.detach()}
        return loss, parts, Seen(video, texts, chosen, clips, batch)

    def _chosen(self) -> tuple[str, ...]:
        """One text per class, drawn where a class has several."""
        return tuple(t[0] if len(t) == 1 else t[int(torch.randint(len(t), ()))] for t in self.prompts)

    def texts(self, chosen: tuple[str, ...]) -> Tensor:
        """(K, D) as the head wants them; kept when no text tower is trained and every class has one text."""
        text: nn.Module | None = self.model.encoder.text
        trained = text is not None and any(p.requires_grad for p in text.parameters())
        if self._kept is not None and not trained:
            return self._kept
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            found = self.model.texts(list(chosen), raw=self.model.pooling.raw_texts)
        if not trained and all(len(texts) == 1 for texts in self.prompts):
            self._kept = found
        return found

    def current_encoder(self) -> Encoder:
        """The encoder with its grafts; a head of a tower's own is part of it."""
        return self.model.encoder

    def components(self) -> dict[str, nn.Module]:
        """The head, unless it belongs to the tower."""
        return {} if self.model._own else {"video-head": self.model.head}

    def param_groups(self) -> list[dict[str, Any]]:
        """The groups that were given, else one."""
        return [dict(group) for group in self.groups] or super().param_groups()

    def after_update(self, step: int) -> None:
        """Clamp the scale where a method does."""
        if self.max_logit_scale is not None:
            with torch.no_grad():
                self.model.encoder.logit_scale.clamp_(0, math.log(self.max_logit_scale))
