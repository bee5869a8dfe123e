"""Lists of videos with their labels, in the forms that the papers' repositories ship. Parsed from the right.

| form | line |
|---|---|
| ViFi-CLIP, X-CLIP, ILA | ``path label``, where the path may hold blanks |
| EZ-CLIP | ``folder frames label``, a folder of pictures |
| M2-CLIP | ``path x label`` |
| FROSTER, SlowFast | ``path,label`` without a header |
| UCF101, HMDB51 | ``Class/video.avi [1]``, the class is the folder |
| tables | CSV or TSV with a header: video and label or caption |
| JSON | {"path": label} or [{"video": ..., "label": ..., "caption": ...}] |
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipgraft.errors import InputError
from clipgraft_video.decoding import SUFFIXES

VIDEO_COLUMNS = ("video", "path", "file", "video_id", "id")
LABEL_COLUMNS = ("label", "class", "template")
CAPTION_COLUMNS = ("caption", "captions", "sentence", "text")


@dataclass(frozen=True, slots=True)
class Listing:
    """One video: its path as written, its label as written (None without one), its captions."""

    video: str
    label: str | None = None
    captions: tuple[str, ...] = ()


def read_list(file: Path, *, where: str) -> list[Listing]:
    """Every line of a list; ``InputError`` names the file and line that can't be understood."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    suffix = file.suffix.lower()
    if suffix == ".json":
        found = list(_json(text, where))
    elif suffix in (".csv", ".tsv"):
        found = list(_table(text, where, "\t" if suffix == ".tsv" else ","))
    else:
        found = [
            _line(line.strip(), f"{where} line {k}") for k, line in enumerate(text.splitlines(), 1) if line.strip()
        ]
    if not found:
        raise InputError(f"{where}: it lists no video")
    labelled = sum(row.label is not None for row in found)
    if 0 < labelled < len(found):
        bare = next(row.video for row in found if row.label is None)
        raise InputError(f"{where}: {bare} has no label but others have one")
    return found


def _line(line: str, where: str) -> Listing:
    """A line of a list without a header."""
    if "," in line and " " not in line.rpartition(",")[2] and _is_label(line.rpartition(",")[2]):
        video, _, label = line.rpartition(",")
        return Listing(video.strip(), label.strip())
    parts = line.rsplit(None, 2)
    if len(parts) == 3 and _is_label(parts[2]) and _is_label(parts[1]) and not _has_suffix(f"{parts[0]} {parts[1]}"):
        return Listing(parts[0], parts[2])  # folder frames label, or path x label
    parts = line.rsplit(None, 1)
    if len(parts) == 2 and _is_label(parts[1]):
        return Listing(parts[0], parts[1])
    if _has_suffix(line):
        return Listing(line, None)
    raise InputError(f"{where}: expected a path and a whole number, found {line[:80]!r}")


def _is_label(text: str) -> bool:
    return text.strip().lstrip("-").isdecimal()


def _has_suffix(text: str) -> bool:
    return Path(text).suffix.lower() in SUFFIXES


def _table(text: str, where: str, delimiter: str) -> Iterator[Listing]:
    rows = [row for row in csv.reader(text.splitlines(keepends=True), delimiter=delimiter) if any(row)]
    head = [cell.strip().lower() for cell in rows[0]] if rows else []
    video = next((head.index(name) for name in VIDEO_COLUMNS if name in head), None)
    if video is None:  # no header: path, label
        for number, row in enumerate(rows, 1):
            if len(row) < 2 or not _is_label(row[-1]):
                raise InputError(f"{where} row {number}: expected path,label or a header with a column video")
            yield Listing(delimiter.join(row[:-1]).strip(), row[-1].strip())
        return
    label = next((head.index(name) for name in LABEL_COLUMNS if name in head), None)
    caption = next((head.index(name) for name in CAPTION_COLUMNS if name in head), None)
    told: dict[str, Listing] = {}
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(head):
            raise InputError(
                f"{where} row {number}: {len(row)} cells under {len(head)} columns; quote texts with commas"
            )
        path, text = row[video].strip(), "" if caption is None else row[caption].strip()
        given = None if label is None or not row[label].strip() else row[label].strip()
        told[path] = _joined(told.get(path), path, given, (text,) if text else (), f"{where} row {number}")
    yield from told.values()


def _json(text: str, where: str) -> Iterator[Listing]:
    try:
        value = json.loads(text)
    except ValueError:
        raise InputError(f"{where}: no JSON that can be read") from None
    if isinstance(value, Mapping):
        yield from (Listing(str(path), str(label)) for path, label in value.items())
        return
    told: dict[str, Listing] = {}
    for number, row in enumerate(value if isinstance(value, list) else [], 1):
        if not isinstance(row, Mapping) or not (path := _first(row, VIDEO_COLUMNS)):
            raise InputError(f"{where} entry {number}: expected an object with one of {', '.join(VIDEO_COLUMNS)}")
        label, captions = _first(row, LABEL_COLUMNS), _first(row, CAPTION_COLUMNS) or ()
        captions = (captions,) if isinstance(captions, str) else tuple(str(c) for c in captions)
        given = None if label is None else str(label)
        told[str(path)] = _joined(told.get(str(path)), str(path), given, captions, f"{where} entry {number}")
    yield from told.values()


def _first(row: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _joined(before: Listing | None, path: str, label: str | None, captions: tuple[str, ...], where: str) -> Listing:
    """Rows of one video are put together."""
    if not path:
        raise InputError(f"{where}: a row without a video")
    if before is None:
        return Listing(path, label, captions)
    if before.label != label:
        raise InputError(f"{where}: {path} has two labels, {before.label!r} and {label!r}; keep one of them")
    return Listing(path, label, (*before.captions, *captions))
