"""Curves of the training: the loss, each of its terms and what a recipe watched, of one run or of two, overlaid."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from clipgraft.rundir import RunRecord, StageLog
from clipgraft_evaluation.figures import INK, SERIES, curve, inline, panels
from clipgraft_evaluation.page import number

UNDRAWN = ("step", "seconds", "canary_right", "canary_images")
"""Of ``watch.jsonl``: counts and seconds."""


@dataclass(frozen=True, slots=True)
class Line:
    """Values over steps; not-a-number leaves a gap. ``of`` names the run where there are two."""

    steps: Sequence[float]
    values: Sequence[float]
    of: str = ""


@dataclass(frozen=True, slots=True)
class StageFigures:
    """A stage's curves: the loss, each of its terms, and what a recipe watched beside them."""

    name: str
    steps: int
    loss: Markup
    terms: tuple[Markup, ...]
    watched: tuple[Markup, ...] = ()


def stage_figures(stages: Sequence[StageLog]) -> Iterator[StageFigures]:
    """Of one run."""
    for stage in (s for s in stages if s.rows):
        lines, watched = {k: [v] for k, v in _logged(stage).items()}, {k: [v] for k, v in _watched(stage).items()}
        yield _drawn(stage.name, lines, watched)


def overlaid(runs: Mapping[str, RunRecord]) -> list[StageFigures]:
    """Of two runs by name: the stages that both have, every curve that one of them has."""
    logs = {name: {stage.name: stage for stage in run.stages if stage.rows} for name, run in runs.items()}
    first, second = logs.values()
    found = []
    for stage in (stage for stage in first if stage in second):
        lines: dict[str, list[Line]] = {}
        watched: dict[str, list[Line]] = {}
        for name, own in logs.items():
            for into, made in ((lines, _logged(own[stage])), (watched, _watched(own[stage]))):
                for title, line in made.items():
                    into.setdefault(title, []).append(Line(line.steps, line.values, name))
        found.append(_drawn(stage, lines, watched))
    return found


def _logged(stage: StageLog) -> dict[str, Line]:
    """The curves of ``metrics.jsonl``, the loss first."""
    steps = [float(row["step"]) for row in stage.rows]
    named = {"loss": [_float(row.get("loss")) for row in stage.rows]}
    for term in dict.fromkeys(term for row in stage.rows for term in row.get("terms", {})):
        values = [_float(row.get("terms", {}).get(term)) for row in stage.rows]
        if values != named["loss"]:  # a single term is the loss itself
            named[term] = values
    for key in ("lr", "grad_norm"):
        values = [_float(row.get(key)) for row in stage.rows]
        if any(map(math.isfinite, values)):
            named[key.replace("_", " ")] = values
    return {title: Line(steps, values) for title, values in named.items()}


def _watched(stage: StageLog) -> dict[str, Line]:
    """A curve per number of ``watch.jsonl``, but for counts and seconds."""
    steps = [float(row["step"]) for row in stage.watched]
    keys = dict.fromkeys(key for row in stage.watched for key in row if key not in UNDRAWN)
    return {key.replace("_", " "): Line(steps, [_float(row.get(key)) for row in stage.watched]) for key in keys}


def _drawn(name: str, lines: Mapping[str, list[Line]], watched: Mapping[str, list[Line]]) -> StageFigures:
    drawn = [
        _figure(f"{name}-{index}", title, own, large=index == 0) for index, (title, own) in enumerate(lines.items())
    ]
    beside = [
        _figure(f"{name}-watch-{title.replace(' ', '_')}", title, own, large=False) for title, own in watched.items()
    ]
    steps = max(int(line.steps[-1]) for line in lines["loss"])
    return StageFigures(name, steps, drawn[0], tuple(drawn[1:]), tuple(beside))


def _figure(name: str, title: str, lines: Sequence[Line], *, large: bool) -> Markup:
    figure, (axis,) = panels(1, width=350 if large else 230, height=230 if large else 150)
    colours = (SERIES[1],) if len(lines) == 1 and not lines[0].of else (SERIES[2], SERIES[1])
    for line, colour in zip(lines, colours, strict=False):
        curve(axis, line.steps, line.values, title=title, color=colour, label=line.of)
    if large:
        axis.set_xlabel("step")
        if any(line.of for line in lines):
            axis.legend(fontsize=9, labelcolor=INK, frameon=False)
    told = "; ".join(f"{line.of}: {_ends(line)}" if line.of else _ends(line) for line in lines)
    return inline(figure, name=name, label=f"{title} over {max(line.steps[-1] for line in lines):.0f} steps, {told}")


def _ends(line: Line) -> str:
    finite = [v for v in line.values if math.isfinite(v)]
    return f"from {number(finite[0])} to {number(finite[-1])}" if finite else "never finite"


def _float(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
