"""Verdicts as a table file, written as they come; the file is whole or absent."""

from __future__ import annotations

import csv
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from clipgraft.errors import ClipgraftError, InputError
from clipgraft_embedding.classify import Verdict

SUFFIXES = (".csv", ".jsonl", ".parquet")
ROWS = 4096
"""Rows of Parquet that are held back to be one row group."""


class Write(Protocol):
    """Takes one verdict."""

    def __call__(self, verdict: Verdict) -> None: ...


def check_suffix(path: Path) -> None:
    """``InputError`` unless the name says the format."""
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path} says no format; let its name end in {', '.join(SUFFIXES)}")


@contextmanager
def verdict_file(path: Path, *, top: int) -> Iterator[Write]:
    """A writer of ``path``, which appears when the block ends without an error.

    ``.jsonl``: ``{"id": ..., "top": [{"label", "probability"}, ...]}`` per line. ``.csv`` and ``.parquet``: columns
    id, label, probability, and label_2, probability_2, ... for further places.
    """
    check_suffix(path)
    names = [name + ("" if place == 1 else f"_{place}") for place in range(1, top + 1) for name in PLACE]
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    writer = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}[path.suffix]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with writer(draft, names) as write:
            yield write
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        raise ClipgraftError(f"{path} could not be written: {error}") from error
    finally:
        draft.unlink(missing_ok=True)


PLACE = ("label", "probability")


def _cells(verdict: Verdict) -> list[Any]:
    return [verdict.id, *chain.from_iterable(zip(verdict.labels, verdict.probabilities, strict=True))]


@contextmanager
def _csv(path: Path, names: list[str]) -> Iterator[Write]:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", *names])
        yield lambda verdict: writer.writerow(_cells(verdict))


@contextmanager
def _jsonl(path: Path, names: list[str]) -> Iterator[Write]:
    with path.open("w", encoding="utf-8") as file:

        def write(verdict: Verdict) -> None:
            file.write(json.dumps(verdict.as_dict(), ensure_ascii=False) + "\n")

        yield write


@contextmanager
def _parquet(path: Path, names: list[str]) -> Iterator[Write]:
    import pyarrow as pa
    from pyarrow import parquet

    kinds = [pa.string(), *(pa.string() if name.startswith("label") else pa.float64() for name in names)]
    schema = pa.schema(list(zip(["id", *names], kinds, strict=True)))
    rows: list[list[Any]] = []
    with parquet.ParquetWriter(path, schema) as writer:

        def flush() -> None:
            if rows:
                columns = zip(*rows, strict=True)
                arrays = [pa.array(column, kind) for column, kind in zip(columns, kinds, strict=True)]
                writer.write_table(pa.table(arrays, schema=schema))
                rows.clear()

        def write(verdict: Verdict) -> None:
            rows.append(_cells(verdict))
            if len(rows) == ROWS:
                flush()

        yield write
        flush()
