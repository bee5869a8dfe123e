"""Numbers behind the figures that merging recipes draw, as tables for the page of a run."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING

from clipgraft.reporting import Section, Table

if TYPE_CHECKING:
    from clipgraft.registry import Registry
    from clipgraft.rundir import RunRecord


def merge_numbers(run: RunRecord, *, registry: Registry) -> list[Section]:
    """The path between two models and accuracy after every merge, where a run left ``path.json``, ``accuracy.csv``."""
    tables: list[Table] = []
    for file in sorted((run.path / "stages").glob("*/path.json")):
        tables.append(_path(file))
    for file in sorted((run.path / "stages").glob("*/accuracy.csv")):
        tables += _accuracies(file)
    if not tables:
        return []
    return [Section("Merging in numbers", "What the figures of this run are drawn from.", tables=tuple(tables))]


def _path(file: Path) -> Table:
    told = json.loads(file.read_text("utf-8"))
    points = [point for point in told["path"] if not point["block"]]
    names = [name for name in points[0] if name not in ("block", "alpha")]
    chosen = told.get("chosen_alpha")
    rows = tuple(
        (f"{p['alpha']:g}{', chosen' if p['alpha'] == chosen else ''}", *(float(p[name]) for name in names))
        for p in sorted(points, key=lambda p: float(p["alpha"]))
    )
    caption = f"{told['metric']} along the path, 0 is the base and 1 the fine-tuned model"
    return Table(caption, ("α", *names), rows)


def _accuracies(file: Path) -> list[Table]:
    """One heat map per method, of its first order: a row per merge, a column per task [%]."""
    rows = [row for row in csv.DictReader(file.read_text("utf-8").splitlines()) if row["order"] == "0"]
    found = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        tasks, merges = (list(dict.fromkeys(row[key] for row in own)) for key in ("task", "merged"))
        values = {(row["merged"], row["task"]): 100 * float(row["accuracy"]) for row in own}
        table = tuple((f"after merge {merge}", *(values.get((merge, task), "–") for task in tasks)) for merge in merges)
        found.append(Table(f"{method}: accuracy per task, per cent", ("merged", *tasks), table, shaded=True, places=1))
    return found
