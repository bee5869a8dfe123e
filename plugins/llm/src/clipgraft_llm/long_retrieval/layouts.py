"""Data sets with long captions, as their authors publish them: Urban1k, DOCCI, ShareGPT4V.

Urban1k: Zhang et al., Long-CLIP, arXiv 2403.15378. DOCCI: Onoe et al., arXiv 2404.19753. ShareGPT4V: Chen et al., arXiv
2311.12793. An image without a caption, or a caption without its image, is a bad sample: skipped, counted and named.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from clipgraft.config.schema import Config
from clipgraft.data.images import MAX_PIXELS, SUFFIXES, ImageFiles
from clipgraft.errors import InputError, unknown_name

VALIDATION = 1000
"""Records at the front of ShareGPT4V's file that are validation, and never training."""


class UrbanConfig(Config):
    """``urban1k:DIR``."""

    path: str = Field(description="folder with image/ and caption/")
    max_pixels: int = Field(MAX_PIXELS, gt=0, description="larger images are refused; data.max_pixels sets it [pixels]")


class DocciConfig(UrbanConfig):
    """``docci:DIR?split=test``."""

    path: str = Field(description="folder with docci_descriptions.jsonlines and images/")
    split: str = Field("test", description="train, test, qual_dev or qual_test")


class ShareConfig(UrbanConfig):
    """``sharegpt4v:FILE?images=DIR&split=train``."""

    path: str = Field(description="the JSON list of conversations")
    images: str = Field(description="folder that the image paths start from")
    split: Literal["train", "val", "all"] = Field("val", description="val: the first 1000 records; train: the others")


def urban1k(*, path: str, max_pixels: int = MAX_PIXELS) -> ImageFiles:
    """``image/NAME.jpg`` and ``caption/NAME.txt``, of which the first line counts."""
    name, root = f"urban1k:{path}", Path(path).expanduser().resolve()
    for part in ("image", "caption"):
        if not (root / part).is_dir():
            raise InputError(f"{name}: there is no folder {part}/ in it; expected image/NAME.jpg and caption/NAME.txt")
    pictures = {f.stem: f for f in (root / "image").iterdir() if f.suffix.lower() in SUFFIXES}
    said = {f.stem: _first_line(f, name) for f in (root / "caption").glob("*.txt")}
    if not any(said.get(stem) for stem in pictures):
        raise InputError(
            f"{name}: none of {len(pictures)} images has a caption; name captions like images, 1.jpg 1.txt"
        )
    stems = sorted(pictures.keys() | said.keys(), key=lambda stem: (len(stem), stem))
    captions = {f"image/{pictures[s].name if s in pictures else f'{s}.jpg'}": (said.get(s, ""),) for s in stems}
    return ImageFiles(name, root, captions, {}, (), max_pixels)


def docci(*, path: str, split: str = "test", max_pixels: int = MAX_PIXELS) -> ImageFiles:
    """``docci_descriptions.jsonlines`` with image_file, description and split; images in ``images/`` or beside it."""
    root = Path(path).expanduser().resolve()
    file = root if root.is_file() else root / "docci_descriptions.jsonlines"
    name, root = f"docci:{path}", file.parent
    rows = list(_lines(file, name))
    known = {str(row.get("split")) for _, row in rows}
    if split not in known:
        raise unknown_name(f"split in {name}", split, known)
    folder = "images/" if (root / "images").is_dir() else ""
    captions: dict[str, tuple[str, ...]] = {}
    for number, row in rows:
        if row.get("split") == split:
            image = _text(row, "image_file", f"{name} line {number}")
            captions[folder + image] = (" ".join(_text(row, "description", f"{name} line {number}").split()),)
    return _some(ImageFiles(f"{name}?split={split}", root, captions, {}, (), max_pixels))


def sharegpt4v(
    *, path: str, images: str, split: Literal["train", "val", "all"] = "val", max_pixels: int = MAX_PIXELS
) -> ImageFiles:
    """A list of {image, conversations: [{from: human}, {from: gpt, value: caption}]}; line breaks become spaces.

    The first 1,000 records are validation: ``split=train`` leaves them out, with all other records of their images.
    """
    name, root = f"sharegpt4v:{path}", Path(images).expanduser().resolve()
    if not root.is_dir():
        raise InputError(f"images={images}: there is no such folder; name the one that the image paths start from")
    records = _document(Path(path).expanduser(), name)
    told = [_told(row, f"{name} record {k}") for k, row in enumerate(records)]
    held = {image for image, _ in told[:VALIDATION]}
    captions: dict[str, tuple[str, ...]] = {}
    for k, (image, caption) in enumerate(told):
        if split == "all" or (k < VALIDATION if split == "val" else image not in held):
            captions[image] = (*captions.get(image, ()), caption)
    if not captions:
        raise InputError(f"{name}: split {split} of {len(told)} records is empty; the first {VALIDATION} are val")
    return _some(ImageFiles(f"{name}?split={split}", root, captions, {}, (), max_pixels))


def _some(source: ImageFiles) -> ImageFiles:
    """``source``, unless nothing in it has a caption."""
    if not any(any(captions) for captions in source.captions.values()):
        raise InputError(f"{source.name}: none of its {len(source)} images has a caption; is it the caption file?")
    return source


def _told(row: Any, where: str) -> tuple[str, str]:
    """(image path, caption) of a conversation; the answer to the first question."""
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object, got a {type(row).__name__}")
    turns = row.get("conversations")
    answers = [t.get("value") for t in turns if isinstance(t, dict) and t.get("from") == "gpt"] if turns else []
    if not answers or not isinstance(answers[0], str):
        raise InputError(f"{where}: no caption; expected conversations with a value from gpt")
    return _text(row, "image", where), answers[0].replace("\n", " ").strip()


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: no {key}; found {', '.join(map(str, row)) or 'nothing'}")
    return value.strip()


def _first_line(file: Path, name: str) -> str:
    try:
        with file.open(encoding="utf-8-sig") as lines:
            return lines.readline().strip()
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: {file.name} is not UTF-8 at byte {error.start}; save it as UTF-8") from None


def _document(file: Path, name: str) -> list[Any]:
    try:
        document = json.loads(file.read_text("utf-8-sig"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{name}: no JSON that can be read ({reason}); expected a list of conversations") from None
    if not isinstance(document, list) or not document:
        raise InputError(f"{name}: expected a list of conversations, got {type(document).__name__}")
    return document


def _lines(file: Path, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object)."""
    number = 0
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise InputError(f"{name} line {number}: expected an object, got a {type(row).__name__}")
                    yield number, row
    except FileNotFoundError:
        raise InputError(f"{name}: there is no {file.name}; give the folder that holds it") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{name} line {number}: no JSON ({error}); expected one object per line") from None
