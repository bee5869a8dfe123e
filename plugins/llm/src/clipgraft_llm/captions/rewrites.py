"""A file of rewritten captions: JSON lines, CSV or TSV with an id and a column or field per version."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from clipgraft.errors import InputError

Rewrites = dict[str, dict[str, tuple[str, ...]]]
"""{sample id: {version: texts}}; a version that a row leaves empty is absent."""

LINES, TABLES = (".jsonl", ".ndjson", ".json", ".jsonlines"), (".csv", ".tsv")
KEYS = ("id", "image")


def read_rewrites(path: str, *, name: str) -> Rewrites:
    """All rows, joined by id; texts are stripped, empty ones dropped. ``InputError`` where a row has no id."""
    file = Path(path).expanduser()
    suffix = file.suffix.lower()
    if suffix not in LINES + TABLES:
        raise InputError(f"{name}: expected a file that ends in {', '.join(LINES[:1] + TABLES)}")
    found: Rewrites = {}
    try:
        for where, row in _json_lines(file, name) if suffix in LINES else _table(file, name):
            key = next((str(row[k]).strip() for k in KEYS if row.get(k) not in (None, "")), "")
            if not key:
                raise InputError(f"{name} {where}: no id; expected a field id (or image), as the samples are called")
            versions = found.setdefault(key, {})
            for version, value in row.items():
                if version not in KEYS and (texts := _texts(value, f"{name} {where}: {version}")):
                    versions[version] = versions.get(version, ()) + texts
    except OSError as error:
        raise InputError(f"{name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    if not any(found.values()):
        what = "no row" if not found else f"no caption in any of its {len(found)} rows"
        raise InputError(f"{name}: {what}; expected an id and a column or field for each version of the captions")
    return found


def _texts(value: Any, where: str) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    if bad := [v for v in values if v is not None and not isinstance(v, str)]:
        raise InputError(f"{where} holds a {type(bad[0]).__name__}; expected text or a list of texts")
    return tuple(text for v in values if (text := (v or "").strip()))


def _json_lines(file: Path, name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise InputError(f"{name} line {number}: no JSON ({error}); expected one object per line") from None
            if not isinstance(row, dict):
                raise InputError(f"{name} line {number}: expected an object, got a {type(row).__name__}")
            yield f"line {number}", row


def _table(file: Path, name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        table = csv.DictReader(lines, delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
        if not set(KEYS) & set(table.fieldnames or ()):
            raise InputError(
                f"{name}: expected a column id (or image), found {', '.join(table.fieldnames or ['none'])}"
            )
        try:
            for row in table:
                if None in row:
                    raise InputError(
                        f"{name} line {table.line_num}: more cells than columns; put quotes around captions"
                    )
                yield f"line {table.line_num}", row
        except csv.Error as error:
            raise InputError(f"{name}: not a table that can be read: {error}") from None
