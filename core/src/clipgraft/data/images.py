"""Image files as samples: upright, RGB, and refused when they leave the data folder or could exhaust memory."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from clipgraft.data.base import BadSample, Entry, Sample

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 100_000_000
LONGEST = 500
"""Times that a side may be longer than the other: a strip resized to a model's height would fill the memory."""
SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"))
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What Pillow may try: some of its other decoders start programs (EPS starts Ghostscript)."""
LEAVES = "refused: the path leaves the data folder"


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
    """``decode_image`` of a file, refused when it leaves ``root`` (which is resolved)."""
    _inside(path, root, sample_id)
    return decode_image(path, sample_id=sample_id, max_pixels=max_pixels)


def _inside(path: Path, root: Path, sample_id: str) -> Path:
    """``path`` with its links followed, ``BadSample`` when that leaves ``root`` or is no path at all."""
    try:
        path = path.resolve()
    except (OSError, ValueError, RuntimeError):  # a loop of links, a zero byte
        raise BadSample(sample_id, "not a path that can be followed") from None
    if not path.is_relative_to(root):
        raise BadSample(sample_id, LEAVES)
    if (found := _stat(path)) and not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        raise BadSample(sample_id, "refused: a pipe or a device")  # reading one may wait forever
    return path


def _stat(path: Path) -> os.stat_result | None:
    """None for a file that isn't there or can't be."""
    try:
        return path.stat()
    except (OSError, ValueError):
        return None


def decode_image(file: Path | BinaryIO, *, sample_id: str, max_pixels: int = MAX_PIXELS) -> Image:
    """The first frame, upright by its EXIF tag, as RGB; ``BadSample`` whatever is wrong with the file.

    The header decides about ``max_pixels`` before anything is decoded; Pillow's own limit
    (2 x ``PIL.Image.MAX_IMAGE_PIXELS``) holds beside it.
    """
    from PIL import Image as pillow
    from PIL import ImageOps, UnidentifiedImageError

    try:
        with pillow.open(file, formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                size = f"{image.width} x {image.height} pixels"
                raise BadSample(sample_id, f"refused: {size} exceed data.max_pixels {max_pixels}")
            if max(image.size) > LONGEST * min(image.size):
                raise BadSample(sample_id, f"refused: a strip of {image.width} x {image.height} pixels; cut it up")
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


def checked_weights(captions: Sequence[str], weights: Sequence[float]) -> tuple[float, ...]:
    """``weights`` as floats; ``ValueError`` unless there is one per caption, none negative, their sum positive."""
    found = tuple(float(weight) for weight in weights)
    if found and len(found) != len(captions):
        raise ValueError(f"{len(found)} caption_weights for {len(captions)} captions; give one per caption")
    if found and not (all(0 <= weight < float("inf") for weight in found) and sum(found) > 0):
        raise ValueError("caption_weights must be finite, none negative and not all zero")
    return found


@dataclass
class ImageFiles:
    """A source of image files below ``root``: {relative path: captions} and maybe labels and more of ``Sample``."""

    name: str
    root: Path
    captions: Mapping[str, Sequence[str]]
    labels: Mapping[str, int]
    classes: Sequence[str]
    max_pixels: int
    templates: Sequence[str] = ()
    attributes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    weights: Mapping[str, Sequence[float]] = field(default_factory=dict)
    negatives: Mapping[str, Sequence[str]] = field(default_factory=dict)
    groups: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ids = list(self.captions)
        digest = hashlib.sha256(repr(list(self.classes)).encode())
        for name in self.ids:
            path = self.root / name
            found = _stat(path)
            row = (
                name,
                found and (found.st_size, found.st_mtime_ns),
                tuple(self.captions[name]),
                self.labels.get(name),
            )
            more = tuple(facts[name] for facts in (self.weights, self.negatives, self.groups) if name in facts)
            digest.update(repr(row + more).encode("utf-8", "backslashreplace"))
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        name = self.ids[index]
        if "" in self.captions[name]:
            raise BadSample(name, "empty caption")
        return Sample(
            name,
            read_image(self.root / name, root=self.root, sample_id=name, max_pixels=self.max_pixels),
            tuple(self.captions[name]),
            self.labels.get(name),
            caption_weights=tuple(self.weights.get(name, ())),
            negatives=tuple(self.negatives.get(name, ())),
            group=self.groups.get(name, ""),
        )

    def entry(self, index: int) -> Entry:
        """Everything but the image."""
        name = self.ids[index]
        return Entry(name, tuple(self.captions[name]), self.labels.get(name), self.groups.get(name, ""), name)

    def content(self, index: int) -> bytes:
        """The image file."""
        name = self.ids[index]
        path = _inside(self.root / name, self.root, name)
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise BadSample(name, "missing file") from None
        except OSError as error:
            raise BadSample(name, error.strerror or "can't be read") from None
