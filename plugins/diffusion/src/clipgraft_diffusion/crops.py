"""One fixed crop per image at a generator's resolution, from which CLIP's smaller input is made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from clipgraft.data.base import BadSample, Sample, Source
from clipgraft.data.sampling import seeded
from clipgraft.data.transforms import evaluation_transform, training_transform
from clipgraft.encoders.base import Preprocess
from clipgraft.types import Batch
from clipgraft_diffusion.pictures import sides

CROP = "crop"
"""Name of the crop in ``Sample.extra`` and ``Batch.extra``."""


class Crops:
    """``source`` with every image cropped to ``size`` x ``size`` pixels, and the crop in ``extra`` besides.

    The loader makes CLIP's input from the crop with the evaluation transform, so both see the same part. ``area`` is
    the range of the crop's share, None crops the centre. Deviation: an image keeps its crop in every epoch, so that
    latents can be remembered; the paper's budget is less than one epoch of its data. The official code shrinks the
    crop bilinearly after normalising it, the evaluation transform with the filter of the backbone before. A picture
    with a side below ``smallest`` pixels counts as unreadable.
    """

    def __init__(
        self, source: Source, *, size: int, area: tuple[float, float] | None, seed: int, smallest: int = 1
    ) -> None:
        self.source, self.seed, self.smallest, self.size = source, seed, smallest, (size, size)
        shape = Preprocess(size=(size, size), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        self._whole = evaluation_transform(shape)
        self._part = training_transform(shape, area) if area else None
        self.name = source.name
        self.fingerprint = f"{source.fingerprint}[crops {size} {area} {seed}]"
        self.classes: Sequence[str] = source.classes
        self.templates: Sequence[str] = source.templates
        self.attributes: Mapping[str, Sequence[str]] = source.attributes

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        sample = self.source[index]
        if min(sides(sample.image)) < self.smallest:
            raise BadSample(sample.id, f"smaller than one patch of {self.smallest} px")
        if self._part is None:
            pixels = self._whole(sample.image)
        else:
            pixels = self._part(sample.image, seeded(self.seed, 0, index))
        crop: Tensor = pixels.mul(255).round().byte()
        return replace(sample, image=crop, extra={**sample.extra, CROP: crop})


def crop_batches(source: Source, preprocess: Preprocess, *, most: int, size: int) -> Iterator[Batch]:
    """The readable of ``most`` images at most, evenly spaced, in batches of ``size`` on the CPU, with their crops

    where they have some.
    """
    transform, rows = evaluation_transform(preprocess), []
    for index in range(0, len(source), -(-len(source) // most)):
        try:
            sample = source[index]
        except BadSample:
            continue
        rows.append((sample.id, transform(sample.image), sample.extra.get(CROP)))
    for start in range(0, len(rows), size):
        ids, pixels, crops = zip(*rows[start : start + size], strict=True)
        kept: list[Tensor] = [crop for crop in crops if crop is not None]
        yield Batch(torch.stack(pixels), list(ids), extra={CROP: torch.stack(kept)} if kept else {})
