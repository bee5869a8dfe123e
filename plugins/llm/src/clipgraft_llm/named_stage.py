"""The stage of this plugin's plain recipes: core/finetune's, with wrong, written or stored texts beside the captions.

Shapes: b rows of a chunk, B of this rank, K wrong captions, L text length, D joint space, S teachers' widths together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from clipgraft.config.schema import TrainConfig
from clipgraft.data.base import Source
from clipgraft.encoders.base import Encoder
from clipgraft.finetune import FinetuneStage
from clipgraft.losses.base import Loss
from clipgraft.types import Batch, ImageFeatures, StepOutput, widened
from clipgraft_llm.named_losses import TextInputs, weighted

More = Literal["negatives", "synthetic"]


class NamedStage(FinetuneStage):
    """``more`` names token ids in ``Batch.extra`` that the text tower reads with the captions: negatives (B, K, L) with

    ``present`` (B, K) beside them, synthetic (B, L). ``reference``: a random vector per pair. Texts are cut behind
    their last end token, which is exact. ``Batch.extra`` may hold what stored teachers say: teacher_image,
    teacher_text, teacher_synthetic (B, S).
    """

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
        more: Sequence[More] = (),
        reference: bool = False,
        crop: tuple[float, float] | None = (0.9, 1.0),
        shuffled: bool = False,
    ) -> None:
        super().__init__(
            name,
            train=train,
            source=source,
            encoder=encoder,
            losses=losses,
            weights=weights,
            teacher=teacher,
            max_logit_scale=max_logit_scale,
        )
        self.more, self.reference, self.shuffled = tuple(more), reference, shuffled
        self.training_crop = crop

    def encode(self, batch: Batch) -> tuple[Tensor, ...]:
        """Image, text, each of ``more``, and a live teacher's image and text: (b, D), negatives (b, K, D)."""
        assert batch.text is not None  # wants_text
        pixels = batch.pixels.roll(1, 0) if self.shuffled else batch.pixels
        ids = [x if x.ndim == 3 else x[:, None] for x in (batch.text, *(batch.extra[name] for name in self.more))]
        image, texts = self._both(
            self.encoder, pixels, torch.cat([x.flatten(0, 1) for x in ids])
        )  # ids: (b, 1 or K, L) each
        parts = texts.split([x.shape[0] * x.shape[1] for x in ids])
        shaped = [p.unflatten(0, x.shape[:2]) for p, x in zip(parts, ids, strict=True)]  # (b, 1 or K, D)
        found = [
            x if name == "negatives" else x.squeeze(1) for name, x in zip(("text", *self.more), shaped, strict=True)
        ]
        if self.teacher is None:
            return (image, *found)
        with torch.no_grad():
            return (image, *found, *self._both(self.teacher, pixels, batch.text))  # type: ignore[arg-type]

    @staticmethod
    def _both(encoder: Encoder, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (b, 3, H, W') in [0, 1] and ids (n, L) -> (b, D) and (n, D)."""
        assert encoder.text is not None  # a recipe with captions has a text tower
        image, text = encoder(encoder.preprocess.normalize(pixels), encoder.text.trim(ids))
        assert isinstance(image, ImageFeatures) and text is not None
        return widened(image.pooled), widened(text.pooled)

    def loss_from(self, features: tuple[Tensor, ...], batch: Batch) -> StepOutput:
        """The weighted sum of the losses."""
        names = ("image", "text", *self.more, "teacher_image", "teacher_text")
        values: dict[str, Any] = dict(zip(names, features, strict=False))
        stored = ("present", "teacher_image", "teacher_text", "teacher_synthetic")
        values |= {name: batch.extra[name] for name in stored if name in batch.extra and name not in values}
        if self.reference:
            values["reference"] = torch.randn_like(features[0])
        scale, bias = self.encoder.logit_scale.exp(), self.encoder.logit_bias
        inputs = TextInputs(logit_scale=scale, logit_bias=bias, **values)
        losses: Any = self.losses
        total, terms = weighted(losses, self.weights, inputs)
        return StepOutput(total, terms, len(batch))
