"""``karpathy:`` and ``coco:``: images with several captions, listed in one JSON file.

Layouts: Karpathy and Fei-Fei, Deep Visual-Semantic Alignments, CVPR 2015 (dataset_coco.json, dataset_flickr30k.json);
Chen et al., Microsoft COCO Captions, arXiv 1504.00325 (captions_*.json).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from clipgraft.data.images import MAX_PIXELS, ImageFiles
from clipgraft.errors import InputError, unknown_name
from clipgraft_data.tables import gathered


def karpathy(*, path: str, images: str, split: str = "test", max_pixels: int = MAX_PIXELS) -> ImageFiles:
    """``images[].{filename, filepath, split, sentences[].raw}``. COCO's filepath (val2014) is used where it exists."""
    name, root = f"karpathy:{path}", _folder(images)
    listed = _list(_read(path, name), "images", name)
    known = {str(row.get("split")) for row in listed}
    wanted = split.split("+")
    for part in wanted:
        if part not in known:
            raise unknown_name(f"split in {name}", part, known)
    nested = any((root / folder).is_dir() for folder in {str(row["filepath"]) for row in listed if row.get("filepath")})

    def rows() -> Iterator[tuple[str, Mapping[str, Any]]]:
        for number, row in enumerate(listed, 1):
            if row.get("split") in wanted:
                folder = f"{row['filepath']}/" if nested and row.get("filepath") else ""
                captions = [said.get("raw") for said in _list(row, "sentences", name)] or None
                yield f"image {number}", {"image": f"{folder}{row.get('filename') or ''}", "captions": captions}

    return gathered(rows(), {"captions": 1.0}, name=f"{name}?split={split}", root=root, max_pixels=max_pixels)


def coco(*, path: str, images: str, max_pixels: int = MAX_PIXELS) -> ImageFiles:
    """``images[].{id, file_name}`` and ``annotations[].{image_id, caption}``; an image without any is a bad sample."""
    name, root = f"coco:{path}", _folder(images)
    document = _read(path, name)
    listed = [*_list(document, "images", name), *_list(document, "annotations", name)]
    ids = [value for row in listed for value in (row.get("id"), row.get("image_id"))]
    if odd := [value for value in ids if isinstance(value, list | dict)]:
        raise InputError(f"{name}: an id is {odd[0]!r:.60}; expected numbers or texts")
    files = {row.get("id"): row.get("file_name") for row in _list(document, "images", name)}
    if None in files:
        raise InputError(f"{name}: an image without an id; every entry of images needs id and file_name")
    captions: dict[Any, list[Any]] = {key: [] for key in files}
    for row in _list(document, "annotations", name):
        if "caption" not in row:
            raise InputError(f"{name}: annotations without a caption; use captions_*.json, not instances_*.json")
        if row.get("image_id") not in captions:
            raise InputError(f"{name}: a caption without an image: image_id {row.get('image_id')} is not in images")
        captions[row["image_id"]].append(row["caption"])
    rows = ((f"image {key}", {"image": files[key], "captions": found or None}) for key, found in captions.items())
    return gathered(rows, {"captions": 1.0}, name=name, root=root, max_pixels=max_pixels)


def _folder(images: str) -> Path:
    root = Path(images).expanduser().resolve()
    if not root.is_dir():
        raise InputError(f"images={images}: there is no such folder; name the one that holds the images")
    return root


def _read(path: str, name: str) -> Mapping[str, Any]:
    try:
        document = json.loads(Path(path).expanduser().read_text("utf-8-sig"))
    except OSError as error:
        raise InputError(f"{name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except (ValueError, RecursionError) as error:  # no JSON, numbers of 5,000 digits, 1,000 brackets
        raise InputError(f"{name}: no JSON that can be read: {error}") from None
    if not isinstance(document, dict):
        raise InputError(f"{name}: expected an object with images, got a {type(document).__name__}")
    return document


def _list(document: Mapping[str, Any], key: str, name: str) -> list[Mapping[str, Any]]:
    rows = document.get(key)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{name}: expected a list of objects under {key!r}")
    return rows
