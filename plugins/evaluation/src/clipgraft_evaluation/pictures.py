"""Pictures inside the page: any picture of a source as a data URI, small ones untouched, photographs reduced."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor

from clipgraft.data.images import as_rgb
from clipgraft.reporting import encoded

if TYPE_CHECKING:
    from clipgraft.data.base import Picture


def as_image(picture: Picture) -> Image.Image:
    """A source's picture (PIL, or uint8 (3, H, W')) as RGB."""
    if isinstance(picture, Tensor):
        return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    return as_rgb(picture)


def as_uri(image: Image.Image) -> str:
    """``image`` as a data URI."""
    data = encoded(image)
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def tiles_as_uri(tiles: np.ndarray) -> str:
    """(h, w, 3) colours in [0, 1], one pixel per tile; the page enlarges it without smoothing."""
    return as_uri(Image.fromarray((tiles * 255).round().clip(0, 255).astype(np.uint8)))
