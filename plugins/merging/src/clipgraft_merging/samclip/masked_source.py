"""Pictures for the mask stream: SAM's own geometry, with the data's masks, where it has any, moved along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clipgraft.data.base import BadSample, Sample, Source
from clipgraft.errors import InputError

Fit = Literal["pad", "squash"]
INSTANCES = "instances"


class MaskedSource:
    """``source`` as uint8 pictures (3, size, size); ``extra["instances"]`` becomes (K, cells, cells) uint8.

    ``fit`` pad: the longer side becomes ``size``, the rest at the right and below is ``fill``, as SAM sees pictures;
    squash: both sides become ``size``. ``masks``: K, the largest ones are kept; 0 drops them. Masks of a picture cover
    the whole of it, whatever their resolution.
    """

    def __init__(
        self, source: Source, *, size: int, cells: int, masks: int, fit: Fit, fill: tuple[float, float, float]
    ) -> None:
        self.source, self.size, self.cells, self.masks, self.fit = source, size, cells, masks, fit
        self.fill = [round(255 * value) for value in fill]
        self.name = source.name
        self.fingerprint = f"{source.fingerprint}[{fit} {size}, {masks} masks of {cells}]"
        self.classes: Sequence[str] = ()
        self.templates: Sequence[str] = ()
        self.attributes: Mapping[str, Sequence[str]] = {}

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        sample = self.source[index]
        pixels = self._pixels(sample)
        height, width = self._shape(sample)
        extra = {INSTANCES: self._instances(sample, height, width)} if self.masks else {}
        return replace(sample, image=pixels, extra=extra, captions=(), caption_weights=(), attributes={}, label=None)

    @staticmethod
    def _shape(sample: Sample) -> tuple[int, int]:
        image = sample.image
        return (image.shape[-2], image.shape[-1]) if isinstance(image, Tensor) else (image.height, image.width)

    def _inner(self, height: int, width: int, side: int) -> tuple[int, int]:
        """(h, w) of the picture inside a square of ``side``."""
        if self.fit == "squash":
            return side, side
        scale = side / max(height, width)
        return max(1, round(height * scale)), max(1, round(width * scale))

    def _pixels(self, sample: Sample) -> Tensor:
        from torchvision.transforms import functional as T

        from clipgraft.data.images import as_rgb

        image = sample.image
        inner = self._inner(*self._shape(sample), self.size)
        if isinstance(image, Tensor):
            pixels = image if image.shape[-2:] == inner else T.resize(image, list(inner), antialias=True)
        else:
            pixels = T.pil_to_tensor(T.resize(as_rgb(image), list(inner)))
        if inner == (self.size, self.size):
            return pixels
        square = torch.tensor(self.fill, dtype=torch.uint8)[:, None, None].repeat(1, self.size, self.size)
        square[:, : inner[0], : inner[1]] = pixels
        return square

    def _instances(self, sample: Sample, height: int, width: int) -> Tensor:
        given, square = sample.extra.get(INSTANCES), torch.zeros(self.masks, self.cells, self.cells, dtype=torch.uint8)
        if given is None or not given.numel():
            return square
        if given.ndim != 3:
            raise BadSample(sample.id, f"instances have {given.ndim} dimensions instead of masks, height, width")
        inside = given > 0
        if len(inside) > self.masks:
            largest = inside.flatten(1).sum(1).argsort(descending=True, stable=True)[: self.masks]
            inside = inside[largest]
        inner = self._inner(height, width, self.cells)
        small = F.interpolate(inside[None].float(), size=inner, mode="area")[0]
        square[: len(small), : inner[0], : inner[1]] = (small >= 0.5).to(torch.uint8)
        return square


def has_masks(source: Source, *, looked_at: int = 20) -> bool:
    """Whether the first sample that can be read brings masks; ``InputError`` for a source without a single picture."""
    for index in range(min(len(source), looked_at)):
        try:
            return INSTANCES in source[index].extra
        except BadSample:
            continue
    raise InputError(f"{source.name} holds no readable picture among its first {looked_at}; check data.from")
