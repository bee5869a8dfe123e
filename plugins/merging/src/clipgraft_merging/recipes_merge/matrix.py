"""Accuracy of every task after every merge: kept as it grows, summarised, drawn."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipgraft import files
from clipgraft.errors import InputError
from clipgraft_merging.figures import INK, SERIES, head, panels, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Mapping[str, Mapping[str, float]]


class Book:
    """Rows {key: {task: accuracy}} in a JSON file that is written after each, so that a stop costs one row at most."""

    def __init__(self, path: Path, about: Mapping[str, Any], *, writes: bool) -> None:
        self.path, self.about, self.writes = path, json.loads(json.dumps(about)), writes
        self.rows: dict[str, dict[str, float]] = {}
        if path.is_file():
            told = json.loads(path.read_text("utf-8"))
            if {k: v for k, v in told.items() if k != "rows"} != self.about:
                raise InputError(f"{path} belongs to other orders or methods; start a new run")
            self.rows = told["rows"]

    def row(self, key: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """The row ``key``, measured now unless it is there."""
        if key not in self.rows:
            self.rows[key] = measure()
            if self.writes:
                files.write_json(self.path, {**self.about, "rows": self.rows})
        return self.rows[key]


@dataclass(frozen=True, slots=True)
class Summary:
    """Means over orders. ``average``: accuracy of the last model over tasks; ``learnt``: of each task when it was

    merged; ``backward``: what became of that by the end, over all tasks but the last (Lopez-Paz and Ranzato 2017).
    """

    average: float
    backward: float
    learnt: float

    def as_dict(self) -> dict[str, float]:
        """Plain JSON."""
        return asdict(self)


def summary(rows: Rows, *, method: str, orders: Sequence[Sequence[str]]) -> Summary:
    """Of the rows "METHOD/ORDER/T", T = 1 after the first task."""
    average, backward, learnt = [], [], []
    for k, order in enumerate(orders):
        last = rows[f"{method}/{k}/{len(order)}"]
        own = {name: rows[f"{method}/{k}/{t}"][name] for t, name in enumerate(order, 1)}
        average.append(sum(last[name] for name in order) / len(order))
        learnt.append(sum(own.values()) / len(order))
        backward.append(sum(last[name] - own[name] for name in order[:-1]) / (len(order) - 1))
    count = len(orders)
    return Summary(sum(average) / count, sum(backward) / count, sum(learnt) / count)


def write_matrix(folder: Path, name: str, told: Mapping[str, Any], book: Book, order: Sequence[str]) -> None:
    """The summary as ``name``, all rows as accuracy.csv, and accuracy.svg and .png of the first order."""
    files.write_json(folder / name, dict(told))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["method", "order", "merged", "task", "accuracy"])
    for key, row in book.rows.items():
        method, k, t = key.split("/") if "/" in key else (key, "", "0")
        table.writerows([method, k, t, task, value] for task, value in row.items())
    files.write_text(folder / "accuracy.csv", text.getvalue())
    draw(folder / "accuracy.svg", told, book.rows, order)


def draw(path: Path, told: Mapping[str, Any], rows: Rows, order: Sequence[str]) -> Path:
    """The matrix of the exported method in the first order; beside it the methods' mean accuracies, with others."""
    methods = told["methods"]
    number = 2 if len(methods) > 1 else 1
    side = 90 + 46 * len(order)
    figure, axes = panels(number, width=max(360, side + 60) + (360 if number > 1 else 0), height=max(240, side - 20))
    _matrix(axes[0], told["method"], rows, order)
    if number > 1:
        _methods(axes[1], methods, float(told["base"]))
    return save(figure, path)


def _matrix(axis: Axes, method: str, rows: Rows, order: Sequence[str]) -> None:
    table = [[rows[f"{method}/0/{t}"].get(name, float("nan")) for name in order] for t in range(1, len(order) + 1)]
    axis.imshow(table, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for y, row in enumerate(table):
        for x, value in enumerate(row):
            if value == value:
                color = "#ffffff" if value > 0.55 else "#30343b"
                axis.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=9, color=color)
    axis.set_xticks(range(len(order)), labels=list(order), rotation=30, ha="right")
    axis.set_yticks(range(len(order)), labels=[f"+ {name}" for name in order])
    axis.grid(visible=False)
    axis.set_xlabel("measured on")
    head(axis, f"{method}: accuracy after each merge [%]")


def _methods(axis: Axes, methods: Mapping[str, Mapping[str, float]], base: float) -> None:
    """Two bars per method: when merged, and at the end."""
    names = list(methods)
    for k, (key, label, color) in enumerate(
        (("learnt", "when merged", SERIES[0]), ("average", "at the end", SERIES[1]))
    ):
        places = [row + (k - 0.5) * 0.38 for row in range(len(names))]
        values = [methods[name][key] for name in names]
        axis.barh(places, values, height=0.36, color=color, label=label)
        for place, value in zip(places, values, strict=True):
            axis.text(value, place, f" {100 * value:.1f}", va="center", fontsize=8, color=INK)
    axis.axvline(base, color=INK, linewidth=1.0, linestyle=(0, (4, 3)), label="base")
    axis.set_yticks(range(len(names)), labels=names)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.margins(x=0.14)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, -0.32), ncols=3, fontsize=8, frameon=False, labelcolor=INK)
    head(axis, "mean accuracy over tasks and orders")
