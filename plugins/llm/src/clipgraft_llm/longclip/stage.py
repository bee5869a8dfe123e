"""Long-CLIP's training step: whole images with long captions, reduced images with short ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clipgraft.config.schema import TrainConfig
from clipgraft.encoders.base import Encoder
from clipgraft.errors import ClipgraftError
from clipgraft.losses.base import gathered_unit
from clipgraft.optim import learning_rate
from clipgraft.stage import ContrastiveStage
from clipgraft.types import Batch, StepOutput, widened
from clipgraft_llm.longclip.components import grouped_components, matching
from clipgraft_llm.longclip.config import PcmConfig
from clipgraft_llm.longclip.two_captions import SHORT, TwoCaptions


class LongClipStage(ContrastiveStage):
    """Trains both towers on a source with two captions per image. ``settings`` as in ``LongClipConfig``."""

    wants_text = True

    def __init__(
        self,
        name: str,
        *,
        train: TrainConfig,
        source: TwoCaptions,
        encoder: Encoder,
        pcm: PcmConfig,
        smoothing: float = 0.0,
        scale: float | None = None,
        max_scale: float | None = 100.0,
        decay_all: bool = False,
        augment: bool = False,
    ) -> None:
        super().__init__(name, train=train, source=source)
        if encoder.text is None:
            raise ClipgraftError(f"{name}: the encoder has no text tower")
        self.encoder, self.pcm = encoder, pcm
        self.smoothing, self.max_scale, self.decay_all = smoothing, max_scale, decay_all
        self.training_crop = (0.9, 1.0) if augment else None
        if scale is not None:
            with torch.no_grad():
                encoder.logit_scale.fill_(math.log(scale))
        if encoder.logit_bias is not None:
            encoder.logit_bias.requires_grad_(False)  # it cancels in a softmax

    def encode(self, batch: Batch) -> tuple[Tensor, ...]:
        """Images, long captions and, unless the weight is 0, short ones: (b, D) each, not normalised."""
        text = self.encoder.text
        assert batch.text is not None and text is not None  # wants_text; looked at above
        image = self.encoder.image(self.encoder.preprocess.normalize(batch.pixels)).pooled
        ids = [batch.text] + ([batch.extra[SHORT]] if self.pcm.weight else [])
        return (widened(image), *(widened(text(text.trim(each)).pooled) for each in ids))

    def loss_from(self, features: tuple[Tensor, ...], batch: Batch) -> StepOutput:
        """Both losses over the global batch, with one scale; reduced images stay shorter than one."""
        with torch.autocast(features[0].device.type, enabled=False):
            image, long, *short = (gathered_unit(x) for x in features)
            scale = self.encoder.logit_scale.exp()
            terms = {"long": matching(image, long, scale=scale, smoothing=self.smoothing)}
            loss = terms["long"]
            if short:
                reduced = grouped_components(image, count=self.pcm.components, group=self.pcm.group)
                terms["short"] = matching(reduced, short[0], scale=scale, smoothing=self.smoothing)
                loss = loss + self.pcm.weight * terms["short"]
        return StepOutput(loss, terms, len(batch))

    def current_encoder(self) -> Encoder:
        """The encoder being trained."""
        return self.encoder

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        """Shrink what AdamW's groups leave out, where asked; keep the scale in [1, max_scale], where asked.

        Deviation: AdamW shrinks before it steps, this comes after: other by the square of the learning rate.
        """
        if self.decay_all:
            shrink = 1 - learning_rate(self.train_config, step) * self.train_config.weight_decay
            torch._foreach_mul_([p for p in self.parameters() if p.requires_grad and p.ndim < 2], shrink)
        if self.max_scale is not None:
            self.encoder.logit_scale.clamp_(0, math.log(self.max_scale))
