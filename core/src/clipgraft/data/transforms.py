"""Pictures to pixels: (3, H, W') float in [0, 1], not normalised. (H, W') is ``preprocess.size``."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from clipgraft.data.images import as_rgb
from clipgraft.encoders.base import Preprocess

if TYPE_CHECKING:
    from PIL.Image import Image

    from clipgraft.data.base import Picture


def evaluation_transform(preprocess: Preprocess) -> Callable[[Picture], Tensor]:
    """open_clip's evaluation transform without its normalisation; a uint8 tensor of the right size is only scaled."""
    return partial(_evaluate, preprocess)


def training_transform(preprocess: Preprocess, crop: tuple[float, float]) -> Callable[[Picture, Generator], Tensor]:
    """Random resized crop, bicubic: a share of the area in the range ``crop``, an aspect ratio of 3/4 to 4/3.

    Draws from the given generator what torchvision's ``RandomResizedCrop`` draws from the global one.
    """
    return partial(_augment, preprocess, crop)


def _evaluate(preprocess: Preprocess, picture: Picture) -> Tensor:
    if isinstance(picture, Tensor) and picture.shape[-2:] == preprocess.size:
        return picture.float().div(255)
    image = _opened(picture)
    image = _thick_enough(image, preprocess) if preprocess.resize_mode == "longest" else image
    pixels: Tensor = _open_clip(preprocess)(image)
    return pixels


def _thick_enough(image: Image, preprocess: Preprocess) -> Image:
    """A strip of which resizing by the longer side would leave nothing, padded to what becomes one pixel."""
    from PIL import Image as pillow

    least = math.ceil(max(image.size) / min(preprocess.size))
    if min(image.size) >= least:
        return image
    canvas = pillow.new("RGB", (max(image.width, least), max(image.height, least)), (preprocess.fill_color,) * 3)
    canvas.paste(image, ((canvas.width - image.width) // 2, (canvas.height - image.height) // 2))
    return canvas


@cache
def _open_clip(preprocess: Preprocess) -> Callable[[Image], Tensor]:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    unscaled = {**preprocess.as_dict(), "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    transform: Callable[[Image], Tensor] = image_transform_v2(PreprocessCfg(**unscaled), is_train=False)
    return transform


def _augment(preprocess: Preprocess, crop: tuple[float, float], picture: Picture, generator: Generator) -> Tensor:
    from torchvision.transforms import functional as F

    image, size = _opened(picture), list(preprocess.size)
    box = _box(image.height, image.width, crop, generator)
    pixels: Tensor = F.pil_to_tensor(F.resized_crop(image, *box, size, F.InterpolationMode.BICUBIC))
    return pixels.float().div(255)


def _box(height: int, width: int, crop: tuple[float, float], generator: Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a crop [pixels]; the largest centred one after ten draws that don't fit."""
    for _ in range(10):
        area = height * width * torch.empty(1).uniform_(*crop, generator=generator).item()
        aspect = torch.empty(1).uniform_(math.log(3 / 4), math.log(4 / 3), generator=generator).exp().item()
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(0, height - h + 1, (1,), generator=generator))
            return top, int(torch.randint(0, width - w + 1, (1,), generator=generator)), h, w
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def _opened(picture: Picture) -> Image:
    from torchvision.transforms.functional import to_pil_image

    image: Image = to_pil_image(picture) if isinstance(picture, Tensor) else as_rgb(picture)
    return image
