"""Evaluations on disk: metrics with their intervals as JSON, one row per sample and evaluator as Parquet."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from clipgraft import files
from clipgraft.errors import InputError
from clipgraft.evaluation.base import Evaluation
from clipgraft.evaluation.statistics import Share

SUMMARY = "evaluation.json"


def file_stem(name: str) -> str:
    """An evaluation's name ("core/pairs@toyworld/pairs") as a file name; of a long one the end is a hash of it."""
    stem = "".join(c if c.isalnum() or c in "-_.,=[]" else "--" if c == "@" else "-" for c in name)
    # settings tell two evaluators of one name apart, and file systems take 255 bytes, temporary ending included
    return stem if len(stem.encode()) <= 180 else f"{stem[:40]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def save(folder: Path, found: Mapping[str, Evaluation]) -> None:
    """Write ``evaluation.json`` and ``<name>.parquet`` for every evaluation that kept samples."""
    import pyarrow as arrow
    from pyarrow import parquet

    folder.mkdir(parents=True, exist_ok=True)
    summary = {}
    for name, e in found.items():
        path = folder / f"{file_stem(name)}.parquet"
        if e.samples:
            columns = dict.fromkeys(key for row in e.samples for key in row)
            table = arrow.table({key: [row.get(key) for row in e.samples] for key in columns})
            sink = arrow.BufferOutputStream()
            parquet.write_table(table, sink)
            files.write_bytes(path, sink.getvalue().to_pybytes())
        summary[name] = e.summary() | {"samples": path.name if e.samples else None}
    files.write_json(folder / SUMMARY, summary)


def read(folder: Path) -> dict[str, Evaluation]:
    """What ``save`` wrote. Statistics other than ``Share`` are computed by code and don't come back."""
    if not (folder / SUMMARY).is_file():
        raise InputError(f"{folder} holds no {SUMMARY}; give a folder that clipgraft eval --out wrote")
    found = {}
    for name, entry in json.loads((folder / SUMMARY).read_text("utf-8")).items():
        found[name] = Evaluation(
            metrics=entry["metrics"],
            counts={k: (v[0], v[1]) for k, v in entry.get("counts", {}).items()},
            samples=tuple(read_rows(folder / entry["samples"])) if entry["samples"] else (),
            statistics={k: Share.from_dict(v) for k, v in entry.get("shares", {}).items()},
            intervals={k: (v[0], v[1]) for k, v in entry.get("intervals", {}).items()},
            lower=frozenset(entry.get("lower", ())),
        )
    return found


def read_rows(path: Path) -> list[dict[str, object]]:
    """The rows of a Parquet file; a value that a row never had is left out of it."""
    from pyarrow import ArrowException, parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise InputError(f"{path} can't be read as Parquet: {str(error).splitlines()[0]}") from error
    return [{key: v for key, v in row.items() if v is not None} for row in rows]
