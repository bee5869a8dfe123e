"""Image files as samples: upright, RGB, and refused when they leave the data folder or could exhaust memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from clipgraft.data.base import BadSample, Sample

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 100_000_000
SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"))
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What Pillow may try: some of its other decoders start programs (EPS starts Ghostscript)."""


def as_rgb(image: Image) -> Image:
    """8-bit RGB: transparency on white, 16-bit grey scaled by 1/257; ``ValueError`` for modes without a fixed range."""
    from PIL import Image as pillow

    if image.mode.startswith("I;16"):
        import numpy as np

        return pillow.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"32-bit grey (mode {image.mode}) has no fixed range; save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = pillow.alpha_composite(pillow.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def read_image(path: Path, *, root: Path, sample_id: str, max_pixels: int = MAX_PIXELS) -> Image:
    """The first frame of ``path``, upright by its EXIF tag, as RGB; ``BadSample`` whatever is wrong with the file.

    ``root`` is resolved. The header decides about ``max_pixels`` before anything is decoded; Pillow's own limit
    (2 x ``PIL.Image.MAX_IMAGE_PIXELS``) holds beside it.
    """
    from PIL import Image as pillow
    from PIL import ImageOps, UnidentifiedImageError

    try:
        if not path.resolve().is_relative_to(root):
            raise BadSample(sample_id, "refused: the path leaves the data folder")
        with pillow.open(path, formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                size = f"{image.width} x {image.height} pixels"
                raise BadSample(sample_id, f"refused: {size} exceed data.max_pixels {max_pixels}")
            return as_rgb(ImageOps.exif_transpose(image))
    except BadSample:
        raise
    except FileNotFoundError:
        reason = "missing file"
    except UnidentifiedImageError:
        reason = "not an image that can be read"
    except Exception as error:  # decoders raise anything on damaged files; it is counted and bounded, never lost
        reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0][:100]
    raise BadSample(sample_id, reason)


@dataclass
class ImageFiles:
    """A source of image files below ``root``: {relative path: captions} and maybe {relative path: label}."""

    name: str
    root: Path
    captions: Mapping[str, Sequence[str]]
    labels: Mapping[str, int]
    classes: Sequence[str]
    max_pixels: int
    templates: Sequence[str] = ()
    attributes: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ids = list(self.captions)
        digest = hashlib.sha256(repr(list(self.classes)).encode())
        for name in self.ids:
            path = self.root / name
            stat = path.stat() if path.exists() else None
            row = (name, stat and (stat.st_size, stat.st_mtime_ns), tuple(self.captions[name]), self.labels.get(name))
            digest.update(repr(row).encode("utf-8", "backslashreplace"))
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        name = self.ids[index]
        if "" in self.captions[name]:
            raise BadSample(name, "empty caption")
        image = read_image(self.root / name, root=self.root, sample_id=name, max_pixels=self.max_pixels)
        return Sample(name, image, tuple(self.captions[name]), self.labels.get(name))
