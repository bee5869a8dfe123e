"""One HTML page about a run: what it changed, how it went, and what it was made of. Nothing on it loads anything."""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from clipgraft import files
from clipgraft.errors import ClipgraftError
from clipgraft.rundir import RunRecord, StageLog, read_run
from clipgraft_evaluation.figures import curve, inline, panels
from clipgraft_evaluation.measured import Group, groups, kept, tests, verdicts
from clipgraft_evaluation.pairs import Card, Change, cards
from clipgraft_evaluation.patches import PatchPictures, patch_pictures
from clipgraft_evaluation.pooling_table import POOLINGS, pooling_tables

T = TypeVar("T")

GAINED, LOST, PATCH_IMAGES, LISTED_FILES = 12, 4, 6, 80
"""How many pairs of each kind, images and files the page shows."""


def write_report(run_dir: Path | str, out: Path | str | None = None) -> Path:
    """Write the report of ``run_dir`` to ``out`` (default: report.html in it) and return its path."""
    run = read_run(Path(run_dir))
    path = run.path / "report.html" if out is None else Path(out)
    missing: list[tuple[str, str]] = []
    told = (run.told("before"), run.told("after"))
    both = _try(lambda: (run.results("before"), run.results("after")), "Records of samples", missing) or told
    tested = _try(lambda: tests(both), "Paired tests", missing) or {}
    measured = groups(run, both, tested)
    costs = _try(lambda: kept(run), "What was kept", missing) or []
    poolings = _try(lambda: pooling_tables(*both), "Pairs by pooling", missing) or []
    gallery = _try(lambda: _gallery(run, measured), "Minimal pairs", missing)
    patches = _try(lambda: _patches(run), "Patch features", missing)
    if why := _not_kept(run):
        missing.append(("What was kept", why))
    if not measured:
        missing.append(("Measurements", "this run evaluated nothing (evaluate.on is empty)"))
    if not any(stage.rows for stage in run.stages):
        missing.append(("Training", "no stage wrote metrics"))
    environment = Environment(loader=PackageLoader("clipgraft_evaluation", "page"), autoescape=True,
                              undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    environment.filters |= {"number": number, "signed": signed, "size": size, "span": span}
    style = resources.files("clipgraft_evaluation").joinpath("page/report.css").read_text("utf-8")
    page = environment.get_template("report.html").render(
        run=run,
        style=Markup(style),
        groups=measured,
        number_tested=len(tested),
        poolings=poolings,
        pooling_names=POOLINGS,
        kept=costs,
        verdicts=verdicts(costs),
        tiles=[(group.evaluator, row) for group in measured for row in group.rows[:1]],
        stages=list(_stages(run.stages)),
        drawings=list(_drawings(run.path)),
        gallery=gallery,
        patches=patches,
        facts=list(_facts(run.environment)),
        files=_files(run.path),
        listed=LISTED_FILES,
        missing=missing,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, page)
    return path


def number(value: float | None) -> str:
    """Four significant places for people; a dash for nothing."""
    if value is None:
        return "–"
    return f"{value:.3f}" if 0.001 <= abs(value) < 1000 or value == 0 else f"{value:.3g}"


def signed(value: float | None) -> str:
    """As ``number``, with its sign (a true minus)."""
    return "–" if value is None else f"{'+' if value >= 0 else '−'}{number(abs(value))}"


def span(ends: tuple[float, float] | None, *, sign: bool = False) -> str:
    """An interval in brackets; empty for nothing."""
    show = signed if sign else number
    return "" if ends is None or any(map(math.isnan, ends)) else f"[{show(ends[0])}, {show(ends[1])}]"


def size(count: int) -> str:
    """Bytes for people."""
    power = min(int(math.log(count, 1024)), 3) if count else 0
    return f"{count / 1024**power:.{0 if power == 0 else 1}f} {('B', 'kB', 'MB', 'GB')[power]}"


def _try(make: Callable[[], T | None], title: str, missing: list[tuple[str, str]]) -> T | None:
    """A section that needs models or data which may be gone: its failure is told on the page and costs no other."""
    try:
        return make()
    except Exception as error:
        kind = "" if isinstance(error, ClipgraftError) else f"{type(error).__name__}: "
        missing.append((title, " ".join(f"{kind}{error}".split())))
        return None


def _not_kept(run: RunRecord) -> str:
    """Why the page doesn't say what the training cost, when it was to be measured."""
    if "left_out" in run.retention:
        return f"forgetting was not measured: {run.retention['left_out']} (evaluate.retention)"
    return "" if run.kept or not run.retention else "what could be forgotten was not measured after the training"


@dataclass(frozen=True, slots=True)
class Gallery:
    """Pairs newly told apart and pairs newly confused, with the counts they are taken from."""

    change: Change
    gained: tuple[Card, ...]
    lost: tuple[Card, ...]


def _gallery(run: RunRecord, groups: Sequence[Group]) -> Gallery | None:
    group = next((g for g in groups if g.evaluator.partition("@")[0].endswith(("pairs", "pairs-grid"))), None)
    if group is None or group.change is None:
        raise ClipgraftError("this run kept no records of minimal pairs (add core/pairs to evaluate.on)")
    gained = cards(run, group.evaluator, group.change.gained, at_most=GAINED)
    return Gallery(group.change, tuple(gained), tuple(cards(run, group.evaluator, group.change.lost, at_most=LOST)))


def _patches(run: RunRecord) -> PatchPictures:
    if run.export is None:
        raise ClipgraftError("this run wrote no export")
    return patch_pictures(run, number=PATCH_IMAGES)


@dataclass(frozen=True, slots=True)
class StageFigures:
    """A stage's curves: the loss, each of its terms, and what a recipe watched beside them."""

    name: str
    steps: int
    loss: Markup
    terms: tuple[Markup, ...]
    watched: tuple[Markup, ...] = ()


def _stages(stages: Sequence[StageLog]) -> Iterator[StageFigures]:
    for stage in (s for s in stages if s.rows):
        steps = [float(row["step"]) for row in stage.rows]
        named = {"loss": [_float(row.get("loss")) for row in stage.rows]}
        for term in dict.fromkeys(term for row in stage.rows for term in row.get("terms", {})):
            values = [_float(row.get("terms", {}).get(term)) for row in stage.rows]
            if values != named["loss"]:  # a single term is the loss itself
                named[term] = values
        for key in ("lr", "grad_norm"):
            values = [_float(row.get(key)) for row in stage.rows]
            if any(math.isfinite(v) for v in values):
                named[key.replace("_", " ")] = values
        drawn = [
            _curve(f"{stage.name}-{index}", title, steps, values, large=index == 0)
            for index, (title, values) in enumerate(named.items())
        ]
        yield StageFigures(stage.name, int(steps[-1]), drawn[0], tuple(drawn[1:]), tuple(_watched(stage)))


def _watched(stage: StageLog) -> Iterator[Markup]:
    """A curve per number of ``watch.jsonl``, but for counts and seconds."""
    steps = [float(row["step"]) for row in stage.watched]
    for key in dict.fromkeys(key for row in stage.watched for key in row):
        if key not in ("step", "seconds", "canary_right", "canary_images"):
            values = [_float(row.get(key)) for row in stage.watched]
            yield _curve(f"{stage.name}-watch-{key}", key.replace("_", " "), steps, values, large=False)


def _curve(name: str, title: str, steps: Sequence[float], values: Sequence[float], *, large: bool) -> Markup:
    figure, (axis,) = panels(1, width=350 if large else 230, height=230 if large else 150)
    curve(axis, steps, values, title=title)
    if large:
        axis.set_xlabel("step")
    finite = [v for v in values if math.isfinite(v)]
    ends = f"from {number(finite[0])} to {number(finite[-1])}" if finite else "never finite"
    return inline(figure, name=name, label=f"{title} over {steps[-1]:.0f} steps, {ends}")


def _float(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _facts(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested facts as (name, value) rows."""
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from _facts(value, f"{prefix}{key} ")
        elif value is not None:
            yield f"{prefix}{key}", str(value)


def _drawings(path: Path) -> Iterator[tuple[str, str, str]]:
    """Stage, name and data URI of the SVG files that a recipe drew into its stages' folders."""
    for file in sorted((path / "stages").glob("*/*.svg")):
        yield file.parent.name[3:], file.stem, f"data:image/svg+xml;base64,{b64encode(file.read_bytes()).decode()}"


def _files(path: Path) -> list[tuple[str, int]]:
    """Files of the run with their sizes [bytes], without resume states and reports."""
    found = [p.relative_to(path) for p in sorted(path.rglob("*")) if p.is_file()]
    return [(p.as_posix(), (path / p).stat().st_size) for p in found if "state" not in p.parts and p.suffix != ".html"]
