"""An augmentation that is a few numbers: drawn once, kept, and replayed to the last bit at any image size.

First a crop, resized (bicubic), then two operations of RandAugment by their place in a list (Cubuk et al., arXiv
1909.13719). Shapes: picture of h x w pixels, out (3, H, W').
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from clipgraft.data.images import as_rgb
from clipgraft.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

    from clipgraft.data.base import Picture

OPERATIONS = (
    "identity", "shear-x", "shear-y", "translate-x", "translate-y", "rotate", "brightness", "color", "contrast",
    "sharpness", "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip
"""The place of a name is what a store keeps: never reorder."""
SIGNED = frozenset(OPERATIONS[1:10])
LARGEST = {
    "shear-x": 0.3, "shear-y": 0.3, "translate-x": 150 / 331, "translate-y": 150 / 331, "rotate": 30.0,
    "brightness": 0.9, "color": 0.9, "contrast": 0.9, "sharpness": 0.9, "posterize": 4.0, "solarize": 1.0,
}  # fmt: skip
"""At magnitude 30. Deviation: translations are shares of the side, so that a crop of any size shifts alike."""


@dataclass(frozen=True, slots=True)
class Augmentation:
    """``box``: top, left, height, width [pixels of the picture]; ``operations``: (place in the list, strength) each."""

    box: tuple[int, int, int, int]
    operations: tuple[tuple[int, float], ...] = ()

    def as_list(self) -> list[Any]:
        """Plain JSON types: [[top, left, height, width], [[operation, strength], ...]]."""
        return [list(self.box), [list(operation) for operation in self.operations]]

    @classmethod
    def from_list(cls, value: Sequence[Any]) -> Augmentation:
        """What ``as_list`` gave."""
        box, operations = value
        top, left, height, width = (int(v) for v in box)
        return cls((top, left, height, width), tuple((int(op), float(strength)) for op, strength in operations))


@dataclass(frozen=True, slots=True)
class ReplayableTransform:
    """``area``: range of a crop's share of the picture; ``operations`` per crop, of ``magnitude`` 0 to 30."""

    area: tuple[float, float] = (0.08, 1.0)
    operations: int = 2
    magnitude: float = 9.0

    def sample(self, height: int, width: int, generator: Generator) -> Augmentation:
        """Draw one for a picture of that size. Strengths are kept as fp32, so that storing them loses nothing."""
        box = self._box(height, width, generator)
        drawn = []
        for _ in range(self.operations):
            place = int(torch.randint(len(OPERATIONS), (), generator=generator))
            sign = 1 - 2 * int(torch.randint(2, (), generator=generator))
            name = OPERATIONS[place]
            strength = LARGEST.get(name, 0.0) * self.magnitude / 30 * (sign if name in SIGNED else 1)
            drawn.append((place, float(torch.tensor(strength, dtype=torch.float32))))
        return Augmentation(box, tuple(drawn))

    def _box(self, height: int, width: int, generator: Generator) -> tuple[int, int, int, int]:
        """A share of the area at an aspect ratio of 3/4 to 4/3; the whole picture after ten draws that don't fit."""
        for _ in range(10):
            share, shape = (torch.rand((), generator=generator).item() for _ in range(2))
            size = height * width * (self.area[0] + share * (self.area[1] - self.area[0]))
            aspect = math.exp(math.log(3 / 4) + shape * 2 * math.log(4 / 3))
            w, h = round(math.sqrt(size * aspect)), round(math.sqrt(size / aspect))
            if 0 < w <= width and 0 < h <= height:
                top = int(torch.randint(height - h + 1, (), generator=generator))
                return top, int(torch.randint(width - w + 1, (), generator=generator)), h, w
        return 0, 0, height, width


def replay(picture: Picture, augmentation: Augmentation, size: tuple[int, int]) -> Tensor:
    """(3, H, W') uint8 of ``size`` = (H, W'): a pure function of the three."""
    from torchvision.transforms import functional as F

    image: Image = F.to_pil_image(picture) if isinstance(picture, Tensor) else as_rgb(picture)
    image = F.resized_crop(image, *augmentation.box, list(size), F.InterpolationMode.BICUBIC)
    for place, strength in augmentation.operations:
        if not 0 <= place < len(OPERATIONS):
            raise InputError(f"augmentation operation {place} is unknown; this version knows {len(OPERATIONS)}")
        image = _operation(OPERATIONS[place])(image, strength)
    pixels: Tensor = F.pil_to_tensor(image)
    return pixels


def size_of(picture: Picture) -> tuple[int, int]:
    """Height and width [pixels]."""
    return tuple(picture.shape[-2:]) if isinstance(picture, Tensor) else (picture.height, picture.width)  # type: ignore[return-value]


def _operation(name: str) -> Callable[[Image, float], Image]:
    from torchvision.transforms import functional as F

    linear = F.InterpolationMode.BILINEAR

    def affine(image: Any, *, shift: tuple[float, float] = (0, 0), shear: tuple[float, float] = (0, 0)) -> Any:
        moved = [round(shift[0] * image.width), round(shift[1] * image.height)]
        lean = [math.degrees(math.atan(s)) for s in shear]
        return F.affine(image, angle=0.0, translate=moved, scale=1.0, shear=lean, interpolation=linear)

    found: dict[str, Callable[[Any, float], Any]] = {
        "identity": lambda image, _: image,
        "shear-x": lambda image, s: affine(image, shear=(s, 0)),
        "shear-y": lambda image, s: affine(image, shear=(0, s)),
        "translate-x": lambda image, s: affine(image, shift=(s, 0)),
        "translate-y": lambda image, s: affine(image, shift=(0, s)),
        "rotate": lambda image, s: F.rotate(image, s, interpolation=linear),
        "brightness": lambda image, s: F.adjust_brightness(image, 1 + s),
        "color": lambda image, s: F.adjust_saturation(image, 1 + s),
        "contrast": lambda image, s: F.adjust_contrast(image, 1 + s),
        "sharpness": lambda image, s: F.adjust_sharpness(image, 1 + s),
        "posterize": lambda image, s: F.posterize(image, 8 - round(s)),
        "solarize": lambda image, s: F.solarize(image, round(256 * (1 - s))),
        "autocontrast": lambda image, _: F.autocontrast(image),
        "equalize": lambda image, _: F.equalize(image),
    }
    return found[name]
