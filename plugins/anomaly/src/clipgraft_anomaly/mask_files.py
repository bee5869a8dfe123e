"""A mask file as zeros and ones: ids, palette indices and grey levels above zero are damage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from clipgraft.data.base import BadSample
from clipgraft.data.images import FORMATS, LEAVES
from clipgraft.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

ORIENTATION = 0x0112
"""The EXIF tag; from 5 on width and height change places."""


class Files(Protocol):
    """What a source of files tells about them."""

    name: str
    root: Path
    max_pixels: int


def read_mask(source: Files, image: str, mask: str) -> Tensor:
    """(H, W') uint8, 1 where the mask file is above zero in any colour channel; palettes by index, not by colour.

    ``BadSample`` of the picture when the file can't be read, ``InputError`` when it isn't as large as the picture.
    """
    size, marked = _open(source, image, image, read=False)[0], _open(source, image, mask, read=True)
    if marked[0] != size:
        raise InputError(
            f"{source.name}: mask {mask} is {marked[0][0]} x {marked[0][1]} pixels, its picture {image} {size[0]} x "
            f"{size[1]}; a mask must have its picture's size"
        )
    assert marked[1] is not None  # read=True
    return torch.from_numpy(marked[1])


def _open(source: Files, image: str, path: str, *, read: bool) -> tuple[tuple[int, int], np.ndarray | None]:
    """Upright width and height from the header, and the values above zero when asked for."""
    from PIL import Image as pillow
    from PIL import ImageOps

    file = (source.root / path).resolve()
    if not file.is_relative_to(source.root):
        raise BadSample(image, LEAVES)
    try:
        with pillow.open(file, formats=FORMATS) as opened:
            size = opened.size
            if size[0] * size[1] > source.max_pixels:
                raise BadSample(image, f"refused: {size[0]} x {size[1]} pixels exceed data.max_pixels")
            if opened.getexif().get(ORIENTATION, 1) >= 5:
                size = size[1], size[0]
            return size, above_zero(ImageOps.exif_transpose(opened)) if read else None
    except BadSample:
        raise
    except FileNotFoundError:
        reason = "missing file"
    except Exception as error:  # decoders raise anything on damaged files
        reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0][:100]
    raise BadSample(image, f"mask {Path(path).name}: {reason}" if read else reason)


def above_zero(image: Image) -> np.ndarray:
    """(H, W') uint8 0 or 1; transparency says nothing about damage and is left out."""
    values = np.asarray(image)
    if values.ndim == 3:
        values = values[..., : values.shape[2] - (image.mode in ("LA", "PA", "La", "RGBA", "RGBa"))].max(-1)
    return (values > 0).astype(np.uint8)
