"""``visa:DIR``: VisA (Zou et al. 2022), as published or converted to folders.

Published: split_csv/1cls.csv (object, split, label, image, mask) beside <part>/Data/Images/{Normal,Anomaly} and
<part>/Data/Masks/Anomaly. Converted: <part>/{train,test}/{good,bad} and <part>/ground_truth/bad.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from clipgraft.data.images import MAX_PIXELS
from clipgraft.errors import InputError
from clipgraft_anomaly.inspection import GOOD
from clipgraft_anomaly.layouts import PartFiles, PartsConfig, Row, folders_in, opened
from clipgraft_anomaly.layouts_mvtec import part_rows

COLUMNS = ("object", "split", "label", "image", "mask")
CONVERTED = ("", "1cls", "visa_pytorch", "visa_pytorch/1cls", "VisA_pytorch/1cls")
"""Where the converted parts may lie below DIR."""

Protocol = Literal["1cls", "2cls_fewshot", "2cls_highshot"]


class VisaConfig(PartsConfig):
    """VisA."""

    protocol: Protocol = Field("1cls", description="table of split_csv: one class to train on, or few or many of two")


def visa(
    *,
    path: str,
    split: str = "test",
    object: str | Sequence[str] | None = None,
    max_pixels: int = MAX_PIXELS,
    protocol: Protocol = "1cls",
) -> PartFiles:
    """Reads the table where there is one, and else the converted folders."""
    name, root = f"visa:{path}", Path(path).expanduser().resolve()
    if not root.is_dir():
        raise InputError(f"{name}: there is no such folder")
    if (root / "split_csv").is_dir():
        rows = _table(root, protocol, source=name)
    elif protocol != "1cls":
        raise InputError(f"{name}: protocol {protocol} needs split_csv/{protocol}.csv of the published data; give that")
    else:
        rows = _converted(root, source=name)
    return opened(rows, name=name, root=root, split=split, objects=object, max_pixels=max_pixels)


def _table(root: Path, protocol: Protocol, *, source: str) -> list[Row]:
    """Rows of split_csv/<protocol>.csv; a mask that the table names and nobody has counts as missing."""
    file = root / "split_csv" / f"{protocol}.csv"
    if not file.is_file():
        raise InputError(f"{source}: split_csv/{protocol}.csv is missing; unpack the data set as it is published")
    rows, seen = [], set[str]()
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            table = csv.DictReader(lines)
            if missing := [column for column in COLUMNS if column not in (table.fieldnames or ())]:
                raise InputError(
                    f"{source}: split_csv/{protocol}.csv has no column {missing[0]}; take the published one"
                )
            for cells in table:
                part, split, label, image, mask = ((cells[column] or "").strip() for column in COLUMNS)
                where = f"{source}: split_csv/{protocol}.csv line {table.line_num}"
                if label not in ("normal", "anomaly") or not image:
                    raise InputError(f"{where} has label {label!r} and image {image!r}; take the published table")
                if image in seen:
                    raise InputError(f"{where} lists {image} again; take the published table")
                seen.add(image)
                bad = label == "anomaly"
                there = mask if bad and mask and (root / mask).is_file() else None
                rows.append(Row(image, int(bad), part, "bad" if bad else GOOD, split, there))
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: split_csv/{protocol}.csv is not UTF-8 at byte {error.start}") from None
    return rows


def _converted(root: Path, *, source: str) -> list[Row]:
    """Rows of the folders."""
    for inside in CONVERTED:
        parts = root / inside
        names = [n for n in folders_in(parts) if (parts / n / "test").is_dir()] if parts.is_dir() else []
        if names:
            return [row for n in names for row in part_rows(parts / n, root=root, source=source)]
    raise InputError(
        f"{source}: found neither split_csv/1cls.csv nor folders <part>/test/good; give the unpacked VisA, or its "
        "converted form"
    )
