"""How a recipe trains a ``Decoder`` of its own in one stage and asks it, frozen, in the next."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from clipgraft.data.base import BadSample, Source
from clipgraft.data.loader import BadSamples, class_prompts, evaluation_batches, stack_images
from clipgraft.data.transforms import evaluation_transform
from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft.runner import Run
from clipgraft.types import Batch, ImageFeatures
from clipgraft_diffusion.decoder import TOKENS, Decoder, DecoderConfig, DecoderStage, Teller, decoder_grid
from clipgraft_diffusion.eps import NoiseSchedule
from clipgraft_diffusion.remember import Remembered
from clipgraft_diffusion.source import Part, held_out_split

STAGE = "decoder"
"""Name of the stage and of the component that it leaves."""


class CaptionTeller:
    """Tells the unit embedding of each caption by the base's text tower; what was said once is remembered."""

    def __init__(self, base: Encoder) -> None:
        if base.text is None:
            raise InputError("a decoder that is told captions needs a model with a text tower; name another model")
        self.base = base
        self._remembered = Remembered()

    @torch.no_grad()
    def __call__(self, batch: Batch, features: ImageFeatures) -> Tensor:
        """(B, D)."""
        if batch.text is None:
            raise InputError("a decoder that is told captions needs data with captions; set decoder.data")
        text, read = batch.text, self.base.text
        assert read is not None
        said = [row.numpy().tobytes().hex() for row in text.cpu()]
        return self._remembered(said, lambda: F.normalize(read(text).pooled.float(), dim=-1))


def decoder_problems(run: Run, config: DecoderConfig, *, captions: bool) -> list[str]:
    """Why such a decoder can't be trained, seen before any work."""
    try:
        decoder_grid(run.encoder.image, pool=config.pool)
        source = run.train_source() if config.data is None else run.open_source(config.data)
        if captions:
            CaptionTeller(run.encoder)
            _require_captions(source)
    except InputError as error:
        return [str(error)]
    return []


def _require_captions(source: Source) -> None:
    """Judged by the first readable sample; class names in templates stand in for captions."""
    for index in range(len(source)):
        try:
            sample = source[index]
        except BadSample:
            continue
        if sample.captions or (sample.label is not None and source.classes):
            return
        raise InputError(
            f"{source.name}: {sample.id} has no caption, which the decoder must be told; set decoder.data to captioned "
            "images, such as csv:FILE with a caption column"
        )


def level_problems(
    config: DecoderConfig, schedule: NoiseSchedule, *, low: int, high: int | None, setting: str, whose: str
) -> list[str]:
    """Why steps ``low`` to ``high`` (one behind the last; None: all) can't be drawn: levels the decoder never meets.

    ``setting`` is the config block of the steps, ``whose`` what the recipe calls the decoder.
    """
    drawn = schedule.alphas[[low, (high or len(schedule)) - 1]].sqrt()
    first, last = ((1 - drawn.square()).sqrt() / (drawn + (1 - drawn.square()).sqrt())).tolist()
    if first >= config.low - 0.01 and last <= config.high + 0.01:
        return []
    return [
        f"{setting} draws levels {first:.2f} to {last:.2f} of the {whose}'s flow, which learns {config.low:g} to "
        f"{config.high:g}; set decoder.low and decoder.high, or {setting}.low and {setting}.high"
    ]


def caption_decoder_stage(run: Run, config: DecoderConfig, *, base: Encoder) -> DecoderStage:
    """A decoder that is told captions by the base's own text tower: a text-to-image model in miniature."""
    width = base.image.embed_dim
    return decoder_stage(run, config, base=base, teller=CaptionTeller(base), told=width, unit=True, captions=True)


def decoder_stage(
    run: Run, config: DecoderConfig, *, base: Encoder, teller: Teller, told: int, unit: bool, captions: bool
) -> DecoderStage:
    """The stage; ``told`` is the width E of what ``teller`` says, ``captions`` whether it reads texts."""
    whole = run.train_source() if config.data is None else run.open_source(config.data)
    source, held = held_out_split(whole, batch_size=config.train.batch_size)
    decoder = Decoder(config, base.image, told=told, unit=unit).to(run.device)
    count = min(config.samples, len(source))
    decoder.statistics.estimate(_raw(run, decoder, base, Part(source, range(count))))
    return DecoderStage(
        STAGE,
        config=config,
        source=source,
        held_out=list(held_out_batches(base, held, captions=captions)),
        base=base,
        decoder=decoder,
        teller=teller,
        captions=captions,
    )


def trained_decoder(run: Run, config: DecoderConfig, *, base: Encoder, told: int, unit: bool) -> Decoder:
    """What the stage left, frozen."""
    decoder = Decoder(config, base.image, told=told, unit=unit)
    decoder.load_state_dict(run.component(STAGE, STAGE))
    return decoder.requires_grad_(False).eval().to(run.device)


@torch.no_grad()
def _raw(run: Run, decoder: Decoder, base: Encoder, source: Source) -> Iterator[Tensor]:
    batches = evaluation_batches(source, preprocess=base.preprocess, batch_size=256, bad=BadSamples(len(source)))
    with run.log.progress("reading tokens", len(source)) as bar:
        for items in batches:
            pixels = stack_images(items).to(run.device)
            features: ImageFeatures = base.image(base.preprocess.normalize(pixels), TOKENS)
            assert features.tokens is not None
            yield decoder.raw(features.tokens)
            bar.advance(len(items))


def held_out_batches(base: Encoder, source: Source, *, captions: bool, size: int = 128) -> Iterator[Batch]:
    """The readable samples as batches on the CPU; ``captions`` adds the first caption of each, or its class prompt."""
    transform, rows = evaluation_transform(base.preprocess), []
    for index in range(len(source)):
        try:
            sample = source[index]
        except BadSample:
            continue
        texts = sample.captions or (
            () if sample.label is None else class_prompts(source.classes[sample.label], source.templates)
        )
        if texts or not captions:
            rows.append((sample.id, transform(sample.image), texts[0] if texts else ""))
    for start in range(0, len(rows), size):
        ids, pixels, texts = zip(*rows[start : start + size], strict=True)
        tokenizer = base.data.tokenizer
        text = tokenizer(list(texts)) if captions and tokenizer is not None else None
        yield Batch(torch.stack(pixels), list(ids), text=text)
