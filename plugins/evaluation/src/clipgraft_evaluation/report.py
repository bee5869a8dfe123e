"""One HTML page about a run: what it changed, how it went, and what it was made of. Nothing on it loads anything."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clipgraft.errors import ClipgraftError
from clipgraft.registry import current
from clipgraft.rundir import RunRecord, read_run
from clipgraft_evaluation.contributed import contributed
from clipgraft_evaluation.measured import Group, groups, kept, tests, verdicts
from clipgraft_evaluation.page import flat, told, write_page
from clipgraft_evaluation.pairs import Card, Change, cards
from clipgraft_evaluation.patches import PatchPictures, patch_pictures
from clipgraft_evaluation.pooling_table import POOLINGS, pooling_tables
from clipgraft_evaluation.training_curves import stage_figures

if TYPE_CHECKING:
    from clipgraft.log import RunLog
    from clipgraft.registry import Registry

GAINED, LOST, PATCH_IMAGES, LISTED_FILES = 12, 4, 6, 80
"""How many pairs of each kind, images and files the page shows."""


def write_report(
    run_dir: Path | str, out: Path | str | None = None, *, registry: Registry | None = None, log: RunLog | None = None
) -> Path:
    """Write the report of ``run_dir`` to ``out`` (default: report.html in it) and return its path."""
    run = read_run(Path(run_dir))
    missing: list[tuple[str, str]] = []
    plain = (run.told("before"), run.told("after"))
    both = told(lambda: (run.results("before"), run.results("after")), "Records of samples", missing) or plain
    tested = told(lambda: tests(both), "Paired tests", missing) or {}
    measured = groups(run, both, tested)
    costs = told(lambda: kept(run), "What was kept", missing) or []
    poolings = told(lambda: pooling_tables(*both), "Pairs by pooling", missing) or []
    gallery = told(lambda: _gallery(run, measured), "Minimal pairs", missing)
    patches = told(lambda: _patches(run), "Patch features", missing)
    sections = contributed(run, registry=registry or current(), missing=missing, log=log)
    stages, drawings = list(stage_figures(run.stages)), list(_drawings(run.path))
    if why := _not_kept(run):
        missing.append(("What was kept", why))
    if not measured:
        missing.append(("Measurements", "this run evaluated nothing (evaluate.on is empty)"))
    if not stages:
        missing.append(("Training", "no stage wrote metrics"))
    parts = (
        ("measured", "Before and after", measured),
        ("kept", "What was kept", costs),
        ("pairs", "Pairs that changed", gallery),
        ("patches", "What the patches see", patches),
        *((f"section-{k}", section.title, True) for k, section in enumerate(sections)),
        ("training", "Training", stages),
        ("drawn", "Drawn by the recipe", drawings),
        ("made", "How it was made", True),
        ("missing", "Left out", missing),
    )
    return write_page(
        "report.html",
        run.path / "report.html" if out is None else Path(out),
        run=run,
        contents=[(name, title) for name, title, there in parts if there],
        groups=measured,
        number_tested=len(tested),
        poolings=poolings,
        pooling_names=POOLINGS,
        kept=costs,
        verdicts=verdicts(costs),
        tiles=[(group.evaluator, row) for group in measured for row in group.rows[:1]],
        stages=stages,
        drawings=drawings,
        gallery=gallery,
        patches=patches,
        sections=sections,
        facts=list(flat(run.environment)),
        files=_files(run.path),
        listed=LISTED_FILES,
        missing=missing,
    )


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


def _drawings(path: Path) -> Iterator[tuple[str, str, str]]:
    """Stage, name and data URI of the SVG files that a recipe drew into its stages' folders."""
    for file in sorted((path / "stages").glob("*/*.svg")):
        yield file.parent.name[3:], file.stem, f"data:image/svg+xml;base64,{b64encode(file.read_bytes()).decode()}"


def _files(path: Path) -> list[tuple[str, int]]:
    """Files of the run with their sizes [bytes], without resume states and reports."""
    found = [p.relative_to(path) for p in sorted(path.rglob("*")) if p.is_file()]
    return [(p.as_posix(), (path / p).stat().st_size) for p in found if "state" not in p.parts and p.suffix != ".html"]
