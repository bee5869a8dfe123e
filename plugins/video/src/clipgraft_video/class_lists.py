"""Class names of a video data set, in the forms that are found: CSV, JSON, plain lines, UCF101's classInd.txt."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from clipgraft.errors import InputError


@dataclass(frozen=True)
class ClassList:
    """``names`` by position; ``places`` {the id that a list uses: position}; ``descriptions`` {name: text}."""

    names: tuple[str, ...]
    places: Mapping[str, int]
    descriptions: Mapping[str, str] = field(default_factory=dict)


def read_classes(file: str | Path) -> ClassList:
    """CSV with the header id,name; JSON {"0": "Name: description"} or {"name": id} or a list; lines "1 Name" or "Name".

    Ids count as they are written: position is their order, so UCF101's ids from 1 and others' from 0 both work.
    """
    path, where = Path(file).expanduser(), f"classes {file}"
    if not path.is_file():
        raise InputError(f"{where}: there is no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    if path.suffix.lower() == ".json":
        pairs = _json(text, where)
    elif path.suffix.lower() == ".csv":
        pairs = _csv(text, where)
    else:
        pairs = _lines(text)
    if not pairs:
        raise InputError(f"{where}: it names no class")
    for kind, values in (("id", [i for i, _, _ in pairs]), ("class", [name for _, name, _ in pairs])):
        if double := [value for value, times in Counter(values).items() if times > 1]:
            raise InputError(f"{where}: the {kind} {double[0]} is given twice")
    pairs.sort(key=lambda pair: pair[0])
    described = {name: text for _, name, text in pairs if text}
    return ClassList(tuple(n for _, n, _ in pairs), {str(i): k for k, (i, _, _) in enumerate(pairs)}, described)


def _csv(text: str, where: str) -> list[tuple[int, str, str]]:
    """id,name with a header; or EZ-CLIP's SNo,Class Name,description, whose texts may hold line breaks."""
    rows = list(csv.reader(text.splitlines(keepends=True)))
    head = [cell.strip().lower() for cell in rows[0]] if rows else []
    columns = {"id": ("id", "sno"), "name": ("name", "class name"), "text": ("description",)}
    at = {key: next((head.index(n) for n in names if n in head), None) for key, names in columns.items()}
    if at["id"] is None or at["name"] is None:
        raise InputError(f"{where}: expected the header id,name, found {','.join(head) or 'nothing'}")
    found = []
    for number, row in enumerate(rows[1:], 2):
        if not any(cell.strip() for cell in row):
            continue
        try:
            text_at = at["text"]
            described = row[text_at].strip() if text_at is not None and text_at < len(row) else ""
            found.append((int(row[at["id"]]), row[at["name"]].strip(), described))
        except (ValueError, IndexError):
            raise InputError(f"{where} row {number}: expected a whole number and a name, found {row}") from None
    return found


def _json(text: str, where: str) -> list[tuple[int, str, str]]:
    try:
        value = json.loads(text)
        if isinstance(value, list):
            return [(k, str(name), "") for k, name in enumerate(value)]
        if all(str(key).lstrip("-").isdecimal() for key in value):
            return [(int(key), *_described(str(told))) for key, told in value.items()]
        return [(int(number), str(name), "") for name, number in value.items()]
    except (ValueError, TypeError, AttributeError):
        raise InputError(f'{where}: expected {{"0": "name"}}, {{"name": 0}} or ["name"]') from None


def _described(told: str) -> tuple[str, str]:
    """FROSTER's "Name: one sentence"."""
    name, _, text = told.partition(":")
    return name.strip(), text.strip()


def _lines(text: str) -> list[tuple[int, str, str]]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    numbered = [re.fullmatch(r"(\d+)[\s,]+(.+)", line) for line in lines]
    if lines and all(numbered):
        return [(int(m[1]), m[2].strip(), "") for m in numbered if m]
    return [(k, line, "") for k, line in enumerate(lines)]
