"""What the two denoisers have in common: how a generator's parts are opened, sized and fed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from clipgraft.data.base import Source
from clipgraft.data.loader import BadSamples, evaluation_batches, stack_images
from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft.runner import Run
from clipgraft_diffusion.genhancer.stages import AnyFeedback
from clipgraft_diffusion.latent import TokenLatent
from clipgraft_diffusion.source import Part
from clipgraft_diffusion.store import Precision
from clipgraft_diffusion.target import TOKENS, Latent

StageName = Literal["generator", "clip"]


@dataclass(frozen=True, slots=True)
class Kept:
    """A folder for latents on disk, the frozen model that makes them, and what else decides them."""

    folder: str
    model: nn.Module
    precision: Precision = "fp32"
    settings: Mapping[str, str] = field(default_factory=dict)


class Generator(Protocol):
    """What is restored and by whom; a recipe asks it in this order."""

    def sizes(self) -> list[str]:
        """One line per setting that doesn't fit another."""

    def files(self, run: Run) -> list[str]:
        """One line per file that isn't there or doesn't fit the model."""

    def latent(self, run: Run, base: Encoder) -> Latent:
        """What is to be restored, frozen; what is fitted to images is still to be set."""

    def fit(self, run: Run, latent: Latent, base: Encoder, source: Source) -> None:
        """Fit it to the training images."""

    def kept(self, latent: Latent) -> Kept | None:
        """Where what is restored is kept on disk, None for nowhere."""

    def begin(self, run: Run, feedback: AnyFeedback) -> None:
        """Put into the first stage's feedback what it starts from, where that isn't chance."""

    def feedback(self, base: Encoder, latent: Latent, *, stage: StageName) -> AnyFeedback:
        """Condition, denoiser and objective of a stage, with random weights."""


def teacher(run: Run, base: Encoder, *, of: str, setting: str) -> Encoder:
    """The encoder whose tokens are restored: the base ("self") or another one of the same image size."""
    if of == "self":
        return base
    other, size = run.open_encoder(of), base.preprocess.size
    if other.preprocess.size != size:
        raise InputError(
            f"{setting} {of} takes images of {other.preprocess.size[0]} px, the model of {size[0]} px, but "
            "one crop serves both; choose a teacher of the model's size"
        )
    return other


@torch.no_grad()
def raw_tokens(run: Run, latent: TokenLatent, base: Encoder, source: Source, *, samples: int) -> Iterator[Tensor]:
    """Raw tokens of the first ``samples`` images, in batches (b, N, C): the same in every process and resume."""
    tower, count = latent.tower or base.image, min(samples, len(source))
    with run.log.progress("reading tokens", count) as bar:
        for pixels in pixel_batches(run, Part(source, range(count))):
            yield latent.raw(tower(latent.preprocess.normalize(pixels), TOKENS))
            bar.advance(len(pixels))


def pixel_batches(run: Run, source: Source) -> Iterator[Tensor]:
    """The source's readable images in batches (b, 3, H, W') in [0, 1], as the evaluation transform sees them."""
    for items in evaluation_batches(
        source, preprocess=run.encoder.preprocess, batch_size=256, bad=BadSamples(len(source))
    ):
        yield stack_images(items).to(run.device)


def said(attempt: Callable[[], object]) -> list[str]:
    """What ``attempt`` complains about, as a list of no or one line."""
    try:
        attempt()
    except (InputError, ValueError) as error:
        return [str(error)]
    return []
