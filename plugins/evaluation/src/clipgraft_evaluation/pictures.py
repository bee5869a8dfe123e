"""Pictures inside the page: any picture of a source as a data URI, small ones untouched, photographs reduced."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor

from clipgraft.data.images import as_rgb

if TYPE_CHECKING:
    from clipgraft.data.base import Picture

SIDE = 224
"""Longest side of a picture in the page [pixels]."""


def as_image(picture: Picture) -> Image.Image:
    """A source's picture (PIL, or uint8 (3, H, W')) as RGB."""
    if isinstance(picture, Tensor):
        return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    return as_rgb(picture)


def as_uri(image: Image.Image) -> str:
    """``image`` as a data URI: PNG when it is small, else reduced to ``SIDE`` and JPEG."""
    buffer = io.BytesIO()
    if max(image.size) <= 96:
        image.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        image.thumbnail((SIDE, SIDE))
        image.save(buffer, "JPEG", quality=86)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def tiles_as_uri(tiles: np.ndarray) -> str:
    """(h, w, 3) colours in [0, 1], one pixel per tile; the page enlarges it without smoothing."""
    return as_uri(Image.fromarray((tiles * 255).round().clip(0, 255).astype(np.uint8)))
