"""What ``clipgraft compare`` takes: models, folders of results, runs; and what two of them have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clipgraft.config.schema import EvaluatorNode
from clipgraft.errors import InputError
from clipgraft.evaluation import records
from clipgraft.evaluation.base import Evaluation
from clipgraft.evaluation.comparison import Row, compare
from clipgraft.evaluation.suites import check_requested, requested

if TYPE_CHECKING:
    from clipgraft.log import RunLog
    from clipgraft.registry import Registry

__all__ = ["Measured", "Row", "both_of_run", "compare", "measure_both", "results_folder"]

Found = dict[str, Evaluation]


@dataclass(frozen=True, slots=True)
class Measured:
    """Both sides, with the evaluators that only one of them has."""

    a: Found
    b: Found

    @property
    def only_one(self) -> list[str]:
        """Names that can't be compared."""
        return sorted(self.a.keys() ^ self.b.keys())


def results_folder(reference: str) -> Path | None:
    """Where the results of a reference lie: a folder of ``clipgraft eval --out``, or a run's after; None for a model.

    Raises ``InputError`` for a run directory that measured nothing.
    """
    path = Path(reference).expanduser()
    if (path / records.SUMMARY).is_file():
        return path
    if (path / "status.json").is_file() and (path / "config.yaml").is_file():
        if (path / "evaluation" / "after" / records.SUMMARY).is_file():
            return path / "evaluation" / "after"
        raise InputError(f"{path} is a run that measured nothing after it; compare its model, {path / 'export'}")
    return None


def both_of_run(run: str) -> Measured:
    """What a run measured before it and after it; ``InputError`` where one is missing."""
    path = Path(run).expanduser()
    folders = [path / "evaluation" / when for when in ("before", "after")]
    if missing := [folder.name for folder in folders if not (folder / records.SUMMARY).is_file()]:
        kind = f"a run that measured nothing {missing[-1]} it" if (path / "status.json").is_file() else "no run"
        raise InputError(f"{run} is {kind}; give two models or folders of results, or one run with evaluate.on")
    return Measured(records.read(folders[0]), records.read(folders[1]))


def measure_both(
    a: str,
    b: str,
    *,
    on: Sequence[str] = (),
    suite: str | None = None,
    data: str | None = None,
    batch_size: int = 256,
    registry: Registry,
    log: RunLog | None = None,
) -> Measured:
    """Read what is on disk, measure what is a model; a reference given twice is measured once.

    A suite that has different things for the two models is cut to what it has for both.
    """
    folders = {reference: results_folder(reference) for reference in dict.fromkeys((a, b))}
    models = [reference for reference, folder in folders.items() if folder is None]
    if models:
        if len(models) < len(folders) and not on and suite is None:
            raise InputError(
                f"{models[0]} is no folder of clipgraft eval --out; give one, or say with --on what to measure on it"
            )
        check_requested(on, suite, registry=registry)
    elif on or suite is not None:
        raise InputError(
            "--on and --suite say what to measure on models; both sides are results already, leave them out"
        )
    found = {reference: records.read(folder) for reference, folder in folders.items() if folder is not None}
    found |= _measure(models, on, suite, data=data, batch_size=batch_size, registry=registry, log=log)
    both = Measured(found[a], found[b])
    if not both.a.keys() & both.b.keys():
        names = [", ".join(side) or "nothing" for side in (both.a, both.b)]
        raise InputError(f"the two share no evaluator: {names[0]} against {names[1]}")
    return both


def _measure(
    models: Sequence[str],
    on: Sequence[str],
    suite: str | None,
    *,
    data: str | None,
    batch_size: int,
    registry: Registry,
    log: RunLog | None,
) -> dict[str, Found]:
    """One model after the other, so that only one is held while it is measured."""
    from clipgraft.encoders import load
    from clipgraft.evaluation import evaluate

    wanted: list[list[EvaluatorNode]] = []
    if suite is not None and len(models) > 1:
        wanted = [requested(on, suite, load(model, registry=registry).eval(), registry=registry) for model in models]
    found = {}
    for model in models:
        encoder = load(model, registry=registry).eval()
        nodes = [n for n in wanted[0] if n in wanted[1]] if wanted else requested(on, suite, encoder, registry=registry)
        if not nodes:
            raise InputError(f"suite {suite} measures different things on {' and '.join(models)}; name some with --on")
        if log is not None:
            log.info(f"measuring {model}")
        found[model] = evaluate(encoder, nodes, registry=registry, default_data=data, batch_size=batch_size, log=log)
    return found
