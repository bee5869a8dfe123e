"""Samples of a source as batches of pixels or captions, decoded in worker processes, in an order that is known before.

A source is cut into parts of ``shard_size`` indices and a part into batches of ``batch_size``. Which samples share a
batch depends on nothing else: not on the workers, the processes, or what is unreadable.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader

from clipgraft.data.base import BadSample, Source
from clipgraft.data.images import ImageFiles
from clipgraft.data.reading import usable_cores
from clipgraft.data.transforms import evaluation_transform
from clipgraft.encoders.base import Preprocess
from clipgraft.errors import ClipgraftError, InputError
from clipgraft_embedding.tower import Kind

if TYPE_CHECKING:
    from PIL.Image import Image

    from clipgraft.data.base import Picture

MANY = 256
"""From this number of images on, decoding gets processes of its own."""


@dataclass(frozen=True, slots=True)
class Span:
    """Source indices ``start`` to ``stop`` of part ``part``."""

    part: int
    start: int
    stop: int


@dataclass(slots=True)
class Rows:
    """The readable rows of a span: ``pixels`` (b, 3, H, W') uint8 or float, None for captions or when b is 0."""

    span: Span
    ids: list[str] = field(default_factory=list)
    labels: list[int | None] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    pixels: Tensor | None = None
    bad: list[str] = field(default_factory=list)


def spans(total: int, *, shard_size: int, batch_size: int) -> list[list[Span]]:
    """The batches of every part of ``total`` indices."""
    bounds = [(start, min(start + shard_size, total)) for start in range(0, total, shard_size)]
    return [
        [Span(part, at, min(at + batch_size, stop)) for at in range(start, stop, batch_size)]
        for part, (start, stop) in enumerate(bounds)
    ]


def cores() -> int:
    """Cores that this process may use, its share when several processes of one launcher run here."""
    return max(usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def usual_workers(source: Source, kind: Kind) -> int:
    """One per core when many files are to be decoded, else none."""
    files = kind == "images" and isinstance(source, ImageFiles) and len(source) > MANY
    return min(cores(), 32) if files else 0


@dataclass
class _Reader:
    """``reader[k]`` reads span k; safe in worker processes. Errors are returned: crossing would wrap them."""

    source: Source
    spans: Sequence[Span]
    transform: Callable[[Picture], Tensor] | None

    def __getitem__(self, k: int) -> Rows | ClipgraftError:
        try:
            return self._read(self.spans[k])
        except ClipgraftError as error:
            return error

    def _read(self, span: Span) -> Rows:
        rows, pixels = Rows(span), list[Tensor]()
        for index in range(span.start, span.stop):
            try:
                if self.transform is None:
                    self._captions(index, rows)
                    continue
                sample = self.source[index]
                pixels.append(self.transform(sample.image))
            except BadSample as error:
                rows.bad.append(str(error))
                continue
            rows.ids.append(sample.id)
            rows.labels.append(sample.label)
            rows.captions.append(sample.captions[0] if sample.captions else "")
        rows.pixels = torch.stack(pixels) if pixels else None
        return rows

    def _captions(self, index: int, rows: Rows) -> None:
        """One row per caption, named ``ID#k``. Of files the image isn't opened."""
        source = self.source
        if isinstance(source, ImageFiles):
            name, label = source.ids[index], source.labels.get(source.ids[index])
            captions = tuple(source.captions[name])
            if "" in captions:
                raise BadSample(name, "empty caption")
        else:
            sample = source[index]
            name, captions, label = sample.id, sample.captions, sample.label
        if not captions:
            raise BadSample(name, "no caption")
        rows.ids += [f"{name}#{k}" for k in range(len(captions))]
        rows.labels += [label] * len(captions)
        rows.captions += captions


def _quiet(worker: int) -> None:
    """Ctrl-C is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def read(
    source: Source, todo: Sequence[Span], *, kind: Kind, preprocess: Preprocess, workers: int = 0
) -> Iterator[Rows]:
    """The rows of each span, in order, at most two batches per worker ahead."""
    if hasattr(source, "patterns"):
        raise InputError(f"{source.name} holds minimal pairs; this needs single images")
    reader = _Reader(source, todo, pixels_of(preprocess) if kind == "images" else None)
    found: Any = map(reader.__getitem__, range(len(todo)))
    if workers and len(todo) > 1:
        batches: Any = reader
        found = DataLoader(
            batches,
            None,
            sampler=range(len(todo)),
            num_workers=min(workers, len(todo)),
            generator=Generator(),  # without it the DataLoader draws from the global one
            worker_init_fn=_quiet,
        )
    for rows in found:
        if isinstance(rows, ClipgraftError):
            raise rows
        yield rows


def pixels_of(preprocess: Preprocess) -> Callable[[Picture], Tensor]:
    """Picture -> (3, H, W') uint8: what ``evaluation_transform`` gives times 255, a quarter of the bytes to move.

    open_clip resizes and crops 8-bit images and scales them last, so nothing is rounded that wasn't.
    """
    from open_clip.transform import MaybeToTensor, PreprocessCfg, image_transform_v2
    from torchvision.transforms import Compose, Normalize

    transform = image_transform_v2(PreprocessCfg(**preprocess.as_dict()), is_train=False)
    *steps, scale, normalise = transform.transforms
    if not isinstance(scale, MaybeToTensor) or not isinstance(normalise, Normalize):
        return evaluation_transform(preprocess)
    return _Pixels(Compose(steps), preprocess)


@dataclass
class _Pixels:
    steps: Any
    preprocess: Preprocess

    def __call__(self, picture: Picture) -> Tensor:
        from torchvision.transforms.functional import pil_to_tensor, to_pil_image

        from clipgraft.data.images import as_rgb

        if isinstance(picture, Tensor):
            if picture.shape[-2:] == self.preprocess.size:
                return picture
            picture = to_pil_image(picture)
        pixels: Tensor = pil_to_tensor(self.steps(as_rgb(cast("Image", picture))))
        return pixels
