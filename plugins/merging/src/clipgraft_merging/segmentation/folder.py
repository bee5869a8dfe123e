"""``merging/segmentation:DIR``: pictures with index masks, in plain folders or as PASCAL VOC lays them out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from clipgraft.config.schema import Config
from clipgraft.data.base import BadSample, Sample
from clipgraft.data.images import FORMATS, LEAVES, MAX_PIXELS, SUFFIXES, read_image
from clipgraft.errors import InputError
from clipgraft_merging.segmentation.overlap import IGNORE

Zero = Literal["background", "class", "ignore"]
NAMES = ("classes.txt", "names.txt")
VOC = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


class SegmentationFolderConfig(Config):
    """A folder of pictures with masks."""

    path: str = Field(description="DIR with images/ and masks/, or with JPEGImages/ and SegmentationClass/ (VOC)")
    split: str | None = Field(
        None, description="VOC: a list in ImageSets/Segmentation, val by default; else a folder in images/ and masks/"
    )
    classes: str | tuple[str, ...] = Field(
        (), description="names of the classes, or a file of DIR with one per line; by default classes.txt, or VOC's 20"
    )
    zero: Zero = Field(
        "background", description="what 0 in a mask file means: background, the first class, or ignore (ADE20K's other)"
    )
    ignore: int = Field(IGNORE, ge=0, le=65535, description="value in mask files of pixels that don't count")
    max_pixels: int = Field(MAX_PIXELS, gt=0, description="larger pictures are refused [pixels]")


@dataclass(frozen=True, slots=True)
class Item:
    """One picture: its id, and its files relative to the root."""

    id: str
    image: Path
    mask: Path
    objects: Path | None = None


class SegmentationFolder:
    """Samples whose ``extra`` holds ``semantics`` (H, W') uint8: 0 background, 1 + class, 255 for what doesn't count.

    VOC's ``SegmentationObject``, where it is there, becomes ``instances`` (K, H, W') uint8. ``segments`` names the
    classes; a mask that holds a class without a name is an error when it is read.
    """

    templates: Sequence[str] = ()
    attributes: Mapping[str, Sequence[str]] = {}

    def __init__(
        self,
        *,
        path: str,
        split: str | None = None,
        classes: str | Sequence[str] = (),
        zero: Zero = "background",
        ignore: int = IGNORE,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.name = f"merging/segmentation:{path}"
        self.root = Path(path).expanduser().resolve()
        if not self.root.is_dir():
            raise InputError(f"{self.name}: there is no such folder")
        voc = (self.root / "JPEGImages").is_dir()
        self.items = _voc(self.root, self.name, split or "val") if voc else _plain(self.root, self.name, split)
        self.segments = _names(self.root, self.name, classes, voc=voc)
        self.classes: Sequence[str] = self.segments
        if len(self.segments) >= IGNORE:
            raise InputError(
                f"{self.name}: {len(self.segments)} classes; at most {IGNORE - 1} fit beside 255 for ignore"
            )
        self.zero, self.ignore, self.max_pixels = zero, ignore, max_pixels
        told = repr((self.segments, zero, ignore, [(i.id, *_stat(self.root, i)) for i in self.items]))
        self.fingerprint = hashlib.sha256(told.encode("utf-8", "backslashreplace")).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Sample:
        item = self.items[index]
        image = read_image(self.root / item.image, root=self.root, sample_id=item.id, max_pixels=self.max_pixels)
        semantics = self._semantics(item)
        if semantics.shape != (image.height, image.width):
            raise InputError(
                f"{self.name}: mask {item.mask} is {semantics.shape[1]} x {semantics.shape[0]} pixels, its picture "
                f"{image.width} x {image.height}; a mask must have its picture's size"
            )
        extra = {"semantics": semantics}
        if item.objects is not None:
            values = read_indices(self.root, item.objects, item.id, max_pixels=self.max_pixels)
            numbers = [k for k in np.unique(values).tolist() if k not in (0, self.ignore)]
            masks = [torch.from_numpy((values == k).astype(np.uint8)) for k in numbers]
            extra["instances"] = torch.stack(masks) if masks else torch.zeros(0, *semantics.shape, dtype=torch.uint8)
        return Sample(item.id, image, extra=extra)

    def _semantics(self, item: Item) -> Tensor:
        values = torch.from_numpy(
            read_indices(self.root, item.mask, item.id, max_pixels=self.max_pixels).astype(np.int64)
        )
        dropped = values == self.ignore
        if self.zero == "ignore":
            dropped |= values == 0
        labels = values + int(self.zero == "class")
        if (seen := labels[~dropped]).numel() and int(seen.max()) > len(self.segments):
            raise InputError(
                f"{self.name}: mask {item.mask} holds {int(values[~dropped].max())}, but there are names for "
                f"{len(self.segments)} classes; add names to classes, or set ignore to the value to leave out"
            )
        return labels.masked_fill(dropped, IGNORE).to(torch.uint8)


def read_indices(root: Path, file: Path, sample_id: str, *, max_pixels: int) -> np.ndarray:
    """(H, W') of a mask file: palette indices, not their colours; 8 or 16 bit grey as it is."""
    from PIL import Image as pillow

    where = (root / file).resolve()
    if not where.is_relative_to(root):
        raise BadSample(sample_id, LEAVES)
    try:
        with pillow.open(where, formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise BadSample(sample_id, f"refused: mask of {image.width} x {image.height} pixels exceeds max_pixels")
            mode, values = image.mode, np.asarray(image)
    except BadSample:
        raise
    except FileNotFoundError:
        raise BadSample(sample_id, f"mask {file.name}: missing file") from None
    except Exception as error:  # decoders raise anything on damaged files
        reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0][:100]
        raise BadSample(sample_id, f"mask {file.name}: {reason}") from None
    if values.ndim != 2:
        raise InputError(
            f"{root}: mask {file} has colours (mode {mode}); expected class numbers, as a palette or grey PNG"
        )
    return values.astype(np.uint8) if values.dtype == bool else values


def _plain(root: Path, name: str, split: str | None) -> list[Item]:
    """images/[SPLIT/]**/X.* with masks/[SPLIT/]**/X.png."""
    below = [Path("images"), Path("masks")] if split is None else [Path("images", split), Path("masks", split)]
    for folder in below:
        if not (root / folder).is_dir():
            raise InputError(
                f"{name}: there is no folder {folder}; expected images/ and masks/ with equal file names, or VOC's "
                "JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/"
            )
    found = []
    for file in sorted((root / below[0]).rglob("*")):
        inside = file.relative_to(root / below[0])
        if file.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in inside.parts):
            found.append(Item(inside.as_posix(), below[0] / inside, below[1] / inside.with_suffix(".png")))
    if not found:
        raise InputError(f"{name}: no picture in {below[0]}; their names end in {', '.join(sorted(SUFFIXES))}")
    if bare := [item for item in found if not (root / item.mask).is_file()]:
        raise InputError(f"{name}: {bare[0].id} has no mask {bare[0].mask} ({len(bare)} such); add or remove")
    return found


def _voc(root: Path, name: str, split: str) -> list[Item]:
    """What a list in ImageSets/Segmentation names."""
    lists = root / "ImageSets" / "Segmentation"
    file = lists / f"{split}.txt"
    if not file.is_file() or Path(split).name != split:
        known = ", ".join(sorted(f.stem for f in lists.glob("*.txt"))) or "none"
        raise InputError(
            f"{name}: there is no list {split}.txt in ImageSets/Segmentation; set split to one of: {known}"
        )
    stems = [line.split()[0] for line in file.read_text("utf-8").splitlines() if line.strip()]
    if not stems:
        raise InputError(f"{name}: {file.name} lists no picture")
    objects = (root / "SegmentationObject").is_dir()
    return [
        Item(
            stem,
            Path("JPEGImages", f"{stem}.jpg"),
            Path("SegmentationClass", f"{stem}.png"),
            Path("SegmentationObject", f"{stem}.png") if objects else None,
        )
        for stem in stems
    ]


def _names(root: Path, name: str, given: str | Sequence[str], *, voc: bool) -> tuple[str, ...]:
    if given and not isinstance(given, str):
        return tuple(given)
    if given and not (root / given).is_file():
        raise InputError(f"{name}: there is no file {given}; give a file in it with one class per line, or a list")
    file = root / given if given else next((root / n for n in NAMES if (root / n).is_file()), None)
    if file is None:
        if voc:
            return VOC
        raise InputError(
            f"{name}: its classes have no names; add classes.txt with one per line, in the order of labels"
        )
    found = tuple(line.strip() for line in file.read_text("utf-8-sig").splitlines() if line.strip())
    if not found:
        raise InputError(f"{name}: {file.name} holds no name; write one class per line")
    return found


def _stat(root: Path, item: Item) -> tuple[object, ...]:
    files = [root / item.image, root / item.mask]
    return tuple((f.stat().st_size, f.stat().st_mtime_ns) if f.exists() else None for f in files)
