"""``parts-table:FILE``: a table of pictures in CSV, TSV or JSON lines, with labels, masks, parts and splits."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from clipgraft.data.images import MAX_PIXELS
from clipgraft.errors import InputError
from clipgraft_anomaly.inspection import GOOD
from clipgraft_anomaly.layouts import LOSSY, PartFiles, PartsConfig, Row, opened

LABELS = {
    0: frozenset(("0", "normal", "good", "ok", "false")),
    1: frozenset(("1", "abnormal", "anomaly", "anomalous", "bad", "defect", "defective", "damaged", "ng", "true")),
}
"""What the column ``label`` may say, in lower case."""
LINES = (".jsonl", ".ndjson")


class PartsTableConfig(PartsConfig):
    """A table; paths in it are relative to its folder, or to ``root``."""

    root: str | None = Field(None, description="folder that the paths start from; relative to the table's folder")
    name: str = Field("object", description="what the part is called where no column says it; prompts may use it")


def parts_table(
    *,
    path: str,
    split: str = "test",
    object: str | Sequence[str] | None = None,
    max_pixels: int = MAX_PIXELS,
    root: str | None = None,
    name: str = "object",
) -> PartFiles:
    """Columns image and label; mask, object, kind and split where wanted. Without splits all are of ``test``."""
    source, file = f"parts-table:{path}", Path(path).expanduser().resolve()
    if not file.is_file():
        raise InputError(f"{source}: there is no such file")
    base = file.parent if root is None else (file.parent / Path(root).expanduser()).resolve()
    if not base.is_dir():
        raise InputError(f"{source}: root {root} is no folder; give the one that the paths start from")
    lines = _json_lines(file, source) if file.suffix.lower() in LINES else _cells(file, source)
    rows: dict[str, Row] = {}
    for where, cells in lines:
        row = _row(cells, called=name, where=where)
        if row.image in rows:
            raise InputError(f"{where}: {row.image} was listed before; keep one row per picture")
        if row.mask is not None and not (base / row.mask).is_file():
            raise InputError(f"{where}: there is no mask {row.mask}; correct the path, or leave the cell empty")
        rows[row.image] = row
    if not rows:
        raise InputError(f"{source}: it holds no row")
    return opened(list(rows.values()), name=source, root=base, split=split, objects=object, max_pixels=max_pixels)


def _row(cells: Mapping[str, Any], *, called: str, where: str) -> Row:
    """One row of the table; empty cells and nulls say nothing."""
    told = {key: str(value).strip() for key, value in cells.items() if value is not None and str(value).strip()}
    image, said = told.get("image"), told.get("label")
    if image is None or said is None:
        raise InputError(f"{where}: has no {'image' if image is None else 'label'}; fill in the cell")
    label = next((k for k, words in LABELS.items() if said.lower() in words), None)
    if label is None:
        raise InputError(f"{where}: label {said!r} is neither normal (0) nor anomalous (1); correct it")
    mask = told.get("mask")
    if mask is not None and Path(mask).suffix.lower() in LOSSY:
        raise InputError(f"{where}: mask {mask} is a JPEG, whose edges hold false values; save masks as PNG")
    kind = told.get("kind", "anomalous") if label else GOOD
    return Row(image, label, told.get("object", called), kind, told.get("split", "test"), mask if label else None)


def _cells(file: Path, source: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place for messages, cells) of a CSV with a header, or a TSV."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            table = csv.DictReader(lines, delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
            columns = list(table.fieldnames or ())
            if not {"image", "label"} <= set(columns):
                raise InputError(
                    f"{source}: expected the columns image and label, found {', '.join(columns) or 'none'}"
                )
            for cells in table:
                where = f"{source} line {table.line_num}"
                if None in cells:
                    raise InputError(f"{where}: more cells than columns; put quotes around cells with separators")
                yield where, cells
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: not UTF-8 at byte {error.start}; save the table as UTF-8") from None
    except csv.Error as error:
        raise InputError(f"{source}: not a table that can be read: {error}") from None


def _json_lines(file: Path, source: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place for messages, object) of every line."""
    number = 0
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise InputError(f"{source} line {number}: expected an object {{...}}; write one per line")
                    yield f"{source} line {number}", row
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: not UTF-8 at byte {error.start} after line {number}; save it as UTF-8") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{source} line {number}: no JSON ({error}); write one object per line") from None
