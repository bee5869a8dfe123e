"""Image-text pairs in a table: one row per caption."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from clipgraft.data.images import MAX_PIXELS, ImageFiles
from clipgraft.errors import InputError


def open_table(file: str | Path, *, max_pixels: int = MAX_PIXELS) -> ImageFiles:
    """``csv:FILE`` (comma-separated, or tab-separated when FILE ends in .tsv), UTF-8, with a header.

    Columns ``image`` (path relative to FILE's folder), ``caption`` and/or ``label``; others are ignored. Rows of one
    image become its captions. Classes are the distinct labels, sorted, as numbers when all of them are.
    """
    path, name = Path(file).expanduser().resolve(), f"csv:{file}"
    if not path.is_file():
        raise InputError(f"{name}: there is no such file")
    try:
        captions, labels = _read(path, name)
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 at byte {error.start}; save the table as UTF-8") from None
    except csv.Error as error:
        raise InputError(f"{name}: not a table that can be read: {error}") from None
    if not captions:
        raise InputError(f"{name}: no row below the header")
    if labels and (bare := captions.keys() - labels.keys()):
        raise InputError(f"{name}: {min(bare)} has no label but others have one; fill in the label column")
    classes = classes_of(labels.values())
    index = {value: k for k, value in enumerate(classes)}
    return ImageFiles(name, path.parent, captions, {i: index[v] for i, v in labels.items()}, classes, max_pixels)


def classes_of(values: Iterable[str]) -> list[str]:
    """The distinct labels, sorted, as numbers when all of them are."""
    names = set(values)
    numeric = all(name.removeprefix("-").isdecimal() and len(name) < 1000 for name in names)
    return sorted(names, key=int if numeric else str)


def _read(path: Path, name: str) -> tuple[dict[str, list[str]], dict[str, str]]:
    """{image: captions} and {image: label}, in the order of the rows."""
    captions: dict[str, list[str]] = {}
    labels: dict[str, str] = {}
    with path.open(encoding="utf-8-sig", newline="") as lines:
        table = csv.DictReader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        columns = list(table.fieldnames or ())
        if "image" not in columns or not {"caption", "label"} & set(columns):
            found = ", ".join(columns) or "none"
            raise InputError(f"{name}: expected the columns image and caption (or label), found {found}")
        for row in table:
            where = f"{name} line {table.line_num}"
            if None in row:
                raise InputError(f"{where}: more cells than columns; put quotes around captions with separators")
            image, caption, label = ((row.get(column) or "").strip() for column in ("image", "caption", "label"))
            if not image:
                raise InputError(f"{where}: a caption without an image; fill in the image column")
            captions.setdefault(image, []).extend([caption] if "caption" in columns else [])
            if label and labels.setdefault(image, label) != label:
                raise InputError(f"{where}: {image} has two labels, {labels[image]!r} and {label!r}; keep one of them")
    return captions, labels
