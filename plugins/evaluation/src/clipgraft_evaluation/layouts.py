"""What published benchmarks have in common: texts in JSON or CSV beside a folder of images, as indexable sources."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipgraft.data.base import BadSample, Pair, Sample
from clipgraft.data.images import MAX_PIXELS, read_image
from clipgraft.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

Box = tuple[int, int, int, int]
"""Left, top, right, bottom [pixels]."""


@dataclass(frozen=True, slots=True)
class PairRow:
    """Two images, by their path below the source's root, and the two texts that describe them."""

    id: str
    images: tuple[str, str]
    texts: tuple[str, str]
    pattern: str


@dataclass(frozen=True, slots=True)
class CaptionRow:
    """An image, cut to ``box`` if there is one, its caption, and captions that are wrong."""

    id: str
    image: str
    caption: str
    negatives: tuple[str, ...]
    group: str
    box: Box | None = None


@dataclass
class ImagePairs:
    """Minimal pairs of image files (a ``PairSource``)."""

    name: str
    root: Path
    rows: Sequence[PairRow]
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        self.patterns = tuple(dict.fromkeys(row.pattern for row in self.rows))
        self.fingerprint = fingerprint(self.root, self.rows, [image for row in self.rows for image in row.images])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Pair:
        row = self.rows[index]
        first, second = (_open(self.root, image, row.id, self.max_pixels) for image in row.images)
        return Pair(row.id, (first, second), row.texts, row.pattern)


@dataclass
class CaptionTests:
    """Images, each with one caption and wrong ones (a ``Source``).

    A mean over groups leaves out the groups in ``unfit`` and those of fewer than ``smallest`` samples.
    """

    name: str
    root: Path
    rows: Sequence[CaptionRow]
    unfit: frozenset[str] = frozenset()
    smallest: int = 1
    max_pixels: int = MAX_PIXELS
    classes: Sequence[str] = ()
    templates: Sequence[str] = ()
    attributes: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.fingerprint = fingerprint(self.root, self.rows, [row.image for row in self.rows])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = self.rows[index]
        image = _open(self.root, row.image, row.id, self.max_pixels)
        if row.box is not None:
            image = _cut(image, row.box, row.id, self.max_pixels)
        return Sample(row.id, image, (row.caption,), negatives=row.negatives, group=row.group)


def fingerprint(root: Path, rows: Sequence[PairRow] | Sequence[CaptionRow], images: Iterable[str]) -> str:
    """Changes with the rows, and with size and time of any image."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode("utf-8", "backslashreplace"))
    for image in dict.fromkeys(images):
        try:
            stat = (root / image).stat()
        except (OSError, ValueError):  # missing, or no name of a file at all: a bad sample when it is read
            stat = None
        digest.update(repr((image, stat and (stat.st_size, stat.st_mtime_ns))).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def folder_of(path: str, *, source: str, holds: str, inside: Sequence[str] = ("",)) -> Path:
    """The first of the folders ``inside`` the benchmark's own in which ``holds`` exists, resolved."""
    root = Path(path).expanduser().resolve()
    if not root.is_dir():
        raise InputError(f"{source}: there is no such folder")
    for name in inside:
        if (root / name / holds).exists():
            return root / name
    raise InputError(f"{source}: {holds} is missing; unpack the benchmark there as it is published")


def read_json(file: Path, *, source: str, lines: bool = False) -> Any:
    """The value in ``file``, or with ``lines`` the list of the values of its lines; ``InputError`` in one line."""
    if not file.is_file():
        raise InputError(f"{source}: {file.name} is missing; unpack the benchmark there as it is published")
    try:
        text = file.read_text("utf-8-sig")
        return [json.loads(line) for line in text.splitlines() if line.strip()] if lines else json.loads(text)
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: {file.name} is not UTF-8 at byte {error.start}; take the published file") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: {file.name} is no JSON ({error}); take the published file") from None


def entries_of(value: Any, *, where: str) -> list[dict[str, Any]]:
    """``value`` if it is a list of objects that isn't empty."""
    if not isinstance(value, list) or not value or not all(isinstance(entry, dict) for entry in value):
        raise InputError(f"{where} holds no list of objects; take the published file")
    return value


def text_of(entry: Mapping[str, Any], key: str, *, where: str) -> str:
    """The text under ``key``, without white space around it."""
    value = entry.get(key)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where} has no text {key!r} but {value!r}; take the published file")
    return value.strip()


def _open(root: Path, image: str, row: str, max_pixels: int) -> Image:
    """The image upright as RGB; ``BadSample`` names it in its reason."""
    try:
        return read_image(root / image, root=root, sample_id=row, max_pixels=max_pixels)
    except BadSample as error:
        raise BadSample(row, f"{Path(image).name}: {error.reason}") from None
    except (OSError, ValueError) as error:
        raise BadSample(row, f"no name of a file: {' '.join(str(error).split())[:60]}") from None


def _cut(image: Image, box: Box, row: str, max_pixels: int) -> Image:
    """The part of an image in ``box``, black where that lies outside, as Pillow has it."""
    left, top, right, bottom = box
    if left >= min(right, image.width) or top >= min(bottom, image.height) or right <= 0 or bottom <= 0:
        raise BadSample(row, f"the box {box} holds nothing of an image of {image.width} x {image.height}")
    if (right - left) * (bottom - top) > max_pixels:
        raise BadSample(row, f"refused: the box {box} exceeds {max_pixels} pixels")
    return image.crop(box)
