"""One HTML page about two runs: which is better at what, how both trained, and what was set differently."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clipgraft.errors import ClipgraftError, InputError
from clipgraft.evaluation.base import Evaluation
from clipgraft.reporting import Table
from clipgraft.rundir import RunRecord, read_run
from clipgraft_evaluation.measured import Both, Group, groups, tests, verdicts
from clipgraft_evaluation.page import flat, told, write_page
from clipgraft_evaluation.pairs import Card, Change, cards_of, change
from clipgraft_evaluation.training_curves import overlaid

if TYPE_CHECKING:
    from clipgraft.log import RunLog

A, B = "A", "B"
SHOWN_PAIRS = 6
UNSET = "not set"


@dataclass(frozen=True, slots=True)
class Gallery:
    """Pairs that only one of the two runs tells apart, and how many there are."""

    change: Change
    gained: tuple[Card, ...]
    lost: tuple[Card, ...]


def write_comparison(
    first: Path | str, second: Path | str, out: Path | str | None = None, *, log: RunLog | None = None
) -> Path:
    """Compare the run ``second`` (B) with ``first`` (A); the page is ``out``, by default B/against-A.html.

    ``InputError`` for what is no run, for one run given twice, and for two that have nothing in common.
    """
    a, b = read_run(Path(first)), read_run(Path(second))
    if a.path.resolve() == b.path.resolve():
        raise InputError(f"{first} and {second} are the same run; give another one, or one alone for its own report")
    missing: list[tuple[str, str]] = []
    if log is not None:
        log.info(f"comparing {b.path} (B) with {a.path} (A)")
    both = told(lambda: (a.results("after"), b.results("after")), "Records of samples", missing)
    measured = _comparable(a, b, both or (a.told("after"), b.told("after")), missing)
    tested = told(lambda: tests(measured), "Paired tests", missing) or {}
    found = groups(b, measured, tested)
    costs = told(lambda: _kept(a, b), "What was kept", missing) or []
    stages = overlaid({A: a, B: b})
    if not found and not stages:
        raise InputError(
            f"{first} and {second} have nothing in common: A measured {_names(a.after)} and trained {_stages(a)}, "
            f"B measured {_names(b.after)} and trained {_stages(b)}"
        )
    if not found:
        missing.append(("Measurements", "no evaluator was measured by both after the run"))
    if not stages:
        missing.append(("Training", f"no stage has one name in both: A trained {_stages(a)}, B {_stages(b)}"))
    gallery = told(lambda: _gallery(b, measured), "Minimal pairs", missing)
    config, environment = _differences(a.config, b.config, by="."), _differences(_made_with(a), _made_with(b))
    parts = (
        ("measured", "After both runs", found),
        ("kept", "What was kept", costs),
        ("pairs", "Pairs that one of them tells apart", gallery),
        ("training", "Training", stages),
        ("config", "Configuration", True),
        ("environment", "Environment", True),
        ("missing", "Left out", missing),
    )
    return write_page(
        "two_runs.html",
        b.path / f"against-{a.path.resolve().name}.html" if out is None else Path(out),
        a=a,
        b=b,
        names=(A, B),
        contents=[(name, title) for name, title, there in parts if there],
        groups=found,
        number_tested=len(tested),
        tiles=[(group.evaluator, row) for group in found for row in group.rows[:1]],
        kept=costs,
        verdicts=verdicts(costs),
        gallery=gallery,
        stages=stages,
        config=_table("Settings that differ", config),
        environment=_table("What differs in versions and hardware", environment),
        missing=missing,
    )


def _comparable(a: RunRecord, b: RunRecord, both: Both, missing: list[tuple[str, str]]) -> Both:
    """The evaluators that both have, but for those that measured on other data and share no sample."""
    found: tuple[dict[str, Evaluation], dict[str, Evaluation]] = ({}, {})
    for name in (name for name in both[0] if name in both[1]):
        data, sides = (a.data_of(name), b.data_of(name)), (both[0][name], both[1][name])
        ids = [{str(row["id"]) for row in side.samples} for side in sides]
        if data[0] != data[1] and not ids[0] & ids[1]:
            missing.append((name, f"A measured it on {data[0]}, B on {data[1]}; they share no sample"))
        elif all(ids) and not ids[0] & ids[1]:
            missing.append((name, "the records of the two share no sample"))
        else:
            for side, evaluation in zip(found, sides, strict=True):
                side[name] = evaluation
    for side, (own, other) in ((A, both), (B, both[::-1])):
        if only := sorted(own.keys() - other.keys()):
            missing.append((f"Measured by {side} alone", ", ".join(only)))
    return found


def _kept(a: RunRecord, b: RunRecord) -> list[Group]:
    """What each of them still can of what it should not forget."""
    own = a.results("retention-after"), b.results("retention-after")
    shared = tuple({name: side[name] for name in side if name in own[0] and name in own[1]} for side in own)
    return groups(b, (shared[0], shared[1]), tests((shared[0], shared[1])), data_of=b.kept_data)


def _gallery(b: RunRecord, both: Both) -> Gallery:
    name = next((n for n in both[0] if n.partition("@")[0].endswith(("pairs", "pairs-grid"))), None)
    moved = None if name is None else change(both[0][name].samples, both[1][name].samples)
    if name is None or moved is None:
        raise ClipgraftError("the two share no records of minimal pairs (core/pairs in evaluate.on)")
    rows = both[0][name].samples, both[1][name].samples
    shown = [cards_of(b.data_of(name), rows, names, at_most=SHOWN_PAIRS) for names in (moved.gained, moved.lost)]
    return Gallery(moved, tuple(shown[0]), tuple(shown[1]))


def _made_with(run: RunRecord) -> dict[str, object]:
    """The environment, with the plugins by name."""
    plugins = {str(p["name"]): f"{p['distribution']} {p['version']}" for p in run.plugins}
    return {**run.environment, "plugin": plugins}


def _differences(a: Mapping[str, object], b: Mapping[str, object], *, by: str = " ") -> list[tuple[str, str, str]]:
    """Name, A's and B's value of what differs, in A's order, then B's own."""
    left, right = dict(flat(a, by=by)), dict(flat(b, by=by))
    keys = {**left, **right}
    return [(k, left.get(k, UNSET), right.get(k, UNSET)) for k in keys if left.get(k) != right.get(k)]


def _table(caption: str, rows: Sequence[tuple[str, str, str]]) -> Table | None:
    """None where nothing differs."""
    return Table(caption, ("what", A, B), tuple(rows)) if rows else None


def _names(found: Mapping[str, object]) -> str:
    return ", ".join(found) or "nothing"


def _stages(run: RunRecord) -> str:
    return ", ".join(_trained(run)) or "nothing"


def _trained(run: RunRecord) -> Iterator[str]:
    return (stage.name for stage in run.stages if stage.rows)
