"""Stage 2: the image tower learns a frozen text model's space, through a projection of its features.

b samples of a chunk, B samples on this rank, V features of the text model, D joint embedding.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from clipgraft.config.schema import TrainConfig
from clipgraft.data.base import Source
from clipgraft.encoders.base import Encoder
from clipgraft.losses.base import LossInputs
from clipgraft.losses.contrastive import ClipLoss
from clipgraft.stage import ContrastiveStage
from clipgraft.types import Batch, StepOutput, widened
from clipgraft_llm.cache.reader import Covered
from clipgraft_llm.llm2clip.layer_rates import layer_rate
from clipgraft_llm.tower.text_tower import LlmText


class VisionStage(ContrastiveStage):
    """Trains image tower, text projection and scale. ``Batch.text`` is token ids, or cached features of captions.

    A text model that belongs to the tower's tensors (weights: stored) stays frozen; one that is only referred to has no
    tensors here.
    """

    wants_text = True

    def __init__(
        self,
        name: str,
        *,
        train: TrainConfig,
        source: Source,
        encoder: Encoder,
        train_image: bool = True,
        visual_decay: float = 1.0,
        compat: Literal["none", "official"] = "none",
        max_logit_scale: float = 100.0,
    ) -> None:
        super().__init__(name, train=train, source=source)
        self.encoder: Encoder = encoder
        self.loss, self.max_logit_scale = ClipLoss(), max_logit_scale
        self.visual_decay, self.compat = visual_decay, compat
        if self.text.holds_model:
            self.freeze(self.text.language)
        if encoder.logit_bias is not None:
            encoder.logit_bias.requires_grad_(False)  # a bias cancels in the softmax
        if not train_image:
            self.freeze(encoder.image)

    @property
    def text(self) -> LlmText:
        """The text tower."""
        return cast(LlmText, self.encoder.text)

    def encode(self, batch: Batch) -> tuple[Tensor, ...]:
        """Pictures and captions in the joint space, (b, D) each, not normalised."""
        assert batch.text is not None  # wants_text
        given = batch.text
        features = given if given.is_floating_point() else self.text.features(given)
        image = self.encoder.image(self.encoder.preprocess.normalize(batch.pixels))
        return widened(image.pooled), widened(self.text.project(features))

    def loss_from(self, features: tuple[Tensor, ...], batch: Batch) -> StepOutput:
        """Symmetric cross-entropy over the batch of all ranks."""
        image, text = features
        found = self.loss(LossInputs(image=image, text=text, logit_scale=self.encoder.logit_scale.exp()))
        terms = {k: v for k, v in found.items() if k != "loss"} | {"logit_scale": self.encoder.logit_scale.exp()}
        return StepOutput(found["loss"], terms, len(batch))

    def current_encoder(self) -> Encoder:
        """The encoder being trained; its own tokenizer, not the cache's."""
        return self.encoder

    def param_groups(self) -> list[dict[str, Any]]:
        """The image tower by layer, then projection and scale at the full rate."""
        by_rate = defaultdict[float, list[nn.Parameter]](list)
        depth = self.encoder.image.depth
        depth = depth - 1 if any(".layer1." in n for n, _ in self.encoder.image.named_parameters()) else depth
        for name, p in self.encoder.image.named_parameters():
            if p.requires_grad:
                by_rate[layer_rate(f".{name}", depth, decay=self.visual_decay, compat=self.compat)].append(p)
        groups: list[dict[str, Any]] = [
            {"name": f"image x {rate:.4g}", "params": params, "lr_scale": rate} for rate, params in by_rate.items()
        ]
        rest = [*self.text.projection.parameters(), self.encoder.logit_scale]
        return [*groups, {"name": "text projection and scale", "params": rest}]

    def after_update(self, step: int) -> None:
        """Keep the scale in [1, max_logit_scale]."""
        with torch.no_grad():
            self.encoder.logit_scale.clamp_(0, math.log(self.max_logit_scale))

    def final_metrics(self) -> dict[str, float]:
        """Samples without cached features, or captions that lost words, whichever this way of training counts."""
        if isinstance(self.source, Covered):
            return {"missing": float(self.source.missing)}
        return {"captions": float(self.text.tokens.seen), "cut": float(self.text.tokens.cut)}
