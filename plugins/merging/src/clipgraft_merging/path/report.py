"""The report of a path: a table (JSON, CSV) and a figure (SVG, PNG)."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipgraft import files
from clipgraft_merging.figures import INK, SERIES, head, panels, save
from clipgraft_merging.path.barrier import barrier
from clipgraft_merging.path.measuring import PathPoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, slots=True)
class PathReport:
    """``points`` as measured; ``metric`` by name, ``lower`` if less of it is better; ``more`` goes into the JSON."""

    start: str
    end: str
    metric: str
    lower: bool
    points: Sequence[PathPoint]
    chosen: float | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Of the data."""
        return list(self.points[0].scores)

    def series(self, name: str, *, block: str = "") -> tuple[list[float], list[float]]:
        """Alphas in rising order and the metric on the data ``name``."""
        rows = sorted((p.alpha, p.scores[name]) for p in self.points if p.block == block)
        return [a for a, _ in rows], [s for _, s in rows]

    def losses(self, name: str, *, block: str = "") -> tuple[list[float], list[float]]:
        """As ``series``, less is better."""
        alphas, scores = self.series(name, block=block)
        return alphas, scores if self.lower else [-s for s in scores]

    def barriers(self, name: str) -> dict[str, float]:
        """{block: barrier of its own path in the metric}; "" is the whole."""
        blocks = dict.fromkeys(p.block for p in self.points)
        return {block: barrier(*self.losses(name, block=block)) for block in blocks}

    def best(self, name: str) -> float:
        """The alpha of the best point of the whole path; of equal ones the smallest."""
        alphas, losses = self.losses(name)
        return alphas[min(range(len(losses)), key=losses.__getitem__)]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "from": self.start,
            "to": self.end,
            "metric": self.metric,
            "lower_is_better": self.lower,
            "path": [{"block": p.block, "alpha": p.alpha, **{n: p.scores[n] for n in self.names}} for p in self.points],
            "barriers": {name: self.barriers(name) for name in self.names},
            "best_alpha": {name: self.best(name) for name in self.names},
            "chosen_alpha": self.chosen,
            **self.more,
        }


def write_report(report: PathReport, folder: Path) -> dict[str, str]:
    """path.json, path.csv, path.svg and path.png into ``folder``; {kind: file}."""
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / "path.json", report.as_dict())
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["block", "alpha", *report.names])
    table.writerows([p.block, p.alpha, *(p.scores[n] for n in report.names)] for p in report.points)
    files.write_text(folder / "path.csv", text.getvalue())
    draw(report, folder / "path.svg")
    return {kind: str(folder / f"path.{kind}") for kind in ("json", "csv", "svg", "png")}


def draw(report: PathReport, path: Path) -> Path:
    """Left the metric by alpha; in the middle, with two data sets, one against the other; right barriers of blocks."""
    names, blocks = report.names, [b for b in report.barriers(report.names[0]) if b]
    number = 1 + (len(names) > 1) + bool(blocks)
    height = max(250, 90 + 16 * len(blocks))
    figure, axes = panels(number, width=40 + 330 * number, height=height)
    rest = iter(axes)
    _along(next(rest), report)
    if len(names) > 1:
        _against(next(rest), report)
    if blocks:
        _barriers(next(rest), report, blocks)
    return save(figure, path)


def _along(axis: Axes, report: PathReport) -> None:
    for name, color in zip(report.names, SERIES[1:], strict=False):
        alphas, scores = report.series(name)
        axis.plot([alphas[0], alphas[-1]], [scores[0], scores[-1]], color=color, linewidth=0.9, linestyle=(0, (4, 3)))
        axis.plot(alphas, scores, color=color, marker="o", markersize=3.5, label=name)
    if report.chosen is not None:
        axis.axvline(report.chosen, color=INK, linewidth=1.0, linestyle=(0, (1, 2)))
        axis.annotate(
            f"chosen {report.chosen:g}",
            (report.chosen, 0.02),
            xycoords=("data", "axes fraction"),
            xytext=(4 if report.chosen < 0.7 else -4, 0),
            textcoords="offset points",
            ha="left" if report.chosen < 0.7 else "right",
            fontsize=8,
            color=INK,
        )
    axis.set_xlabel("α: 0 base, 1 fine-tuned")
    axis.legend(loc="best", fontsize=8, frameon=False, labelcolor=INK)
    head(axis, f"{report.metric} along the path")


def _against(axis: Axes, report: PathReport) -> None:
    first, second = report.names[:2]
    alphas, x = report.series(first)
    _, y = report.series(second)
    axis.plot(x, y, color=SERIES[1], marker="o", markersize=3.5)
    marked = {alphas[0], alphas[-1], report.chosen, report.best(second)} - {None}
    for a, px, py in zip(alphas, x, y, strict=True):
        if a in marked:
            axis.annotate(f"α {a:g}", (px, py), xytext=(5, 4), textcoords="offset points", fontsize=8, color=INK)
    axis.set_xlabel(first)
    axis.set_ylabel(second)
    axis.margins(0.12)
    head(axis, "one against the other")


def _barriers(axis: Axes, report: PathReport, blocks: Sequence[str]) -> None:
    height = 0.8 / len(report.names)
    for k, (name, color) in enumerate(zip(report.names, SERIES[1:], strict=False)):
        found = report.barriers(name)
        places = [row + (k - (len(report.names) - 1) / 2) * height for row in range(len(blocks))]
        axis.barh(places, [found[b] for b in blocks], height=height * 0.9, color=color, label=name)
    axis.set_yticks(range(len(blocks)), labels=list(blocks))
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.axvline(0, color=INK, linewidth=0.8)
    head(axis, "barrier of each block's own path")
