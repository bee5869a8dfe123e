"""Forgetting: what a model could do before a run, whether it still can after it, and how sure that is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from clipgraft import distributed, files
from clipgraft.config.schema import EvaluatorNode, RunConfig, TrainConfig
from clipgraft.errors import ClipgraftError, InputError
from clipgraft.evaluation import records
from clipgraft.evaluation.comparison import Row, as_table, compare
from clipgraft.evaluation.suites import check_suite, open_suite
from clipgraft.manifests import one_line

if TYPE_CHECKING:
    from clipgraft.registry import Registry
    from clipgraft.runner import Run

SUITE = "retention"
"""The suite that ``evaluate.retention: auto`` looks for."""

STATE, FORGETTING = "retention.json", "forgetting.json"


def check(config: RunConfig, *, registry: Registry) -> None:
    """Raise before any work when ``evaluate.retention`` names a suite or file that isn't there."""
    wanted = config.evaluate.retention
    if isinstance(wanted, str) and wanted not in ("auto", "none"):
        check_suite(wanted, registry=registry)


def before(run: Run) -> None:
    """Measure once, before anything is trained.

    Settings that were written down fail here as bad input (exit code 2); ``auto`` says why it is left out.
    """
    wanted, state = run.config.evaluate.retention, _read(run.path / STATE)
    if state or wanted == "none" or (wanted == "auto" and not trains(run.config)):
        return
    problem = ""
    try:
        nodes = _chosen(run)
        run.log.info("measuring what should not be forgotten, before the run")
        found = run.evaluate(run.encoder, nodes)
        state = {"retention": wanted if isinstance(wanted, str) else "list"}
        state["evaluators"] = [node.model_dump() for node in nodes]
        state["before"] = {name: dict(e.metrics) for name, e in found.items()}
    except Exception as error:
        if wanted != "auto" and isinstance(error, ClipgraftError):
            raise InputError(f"evaluate.retention: {error}") from error
        if wanted != "auto":
            raise
        problem = one_line(error)
    if distributed.any_rank(bool(problem)):
        run.log.info(f"forgetting is not measured: {problem or 'another process failed'} (evaluate.retention)")
        state, found = {"left_out": problem}, {}
    if run.is_main:
        records.save(_folder(run, "before"), found) if found else None
        files.write_json(run.path / STATE, state)
    distributed.barrier()


def after(run: Run) -> list[Row]:
    """Measure the same once more, compare, write forgetting.json and print it; empty where nothing was measured.

    Hours of training are worth more than this number: a failure is one line, and the run goes on.
    """
    state = _read(run.path / STATE)
    if "before" not in state:
        return []
    if not (run.path / FORGETTING).exists():
        problem = ""
        try:
            run.log.info("measuring what should not be forgotten, after the run")
            found = run.evaluate(run.encoder, [EvaluatorNode.model_validate(node) for node in state["evaluators"]])
            rows = compare(records.read(_folder(run, "before")), found) if run.is_main else []
        except Exception as error:
            problem = one_line(error)
        if distributed.any_rank(bool(problem)):
            run.log.info(f"what was forgotten is not known: {problem or 'another process failed'}")
            return []
        if run.is_main:
            records.save(_folder(run, "after"), found)
            state["after"] = {name: dict(e.metrics) for name, e in found.items()}
            files.write_json(run.path / STATE, state)
            files.write_json(run.path / FORGETTING, {"rows": [row.as_dict() for row in rows]})
        distributed.barrier()
    rows = read(run.path)
    if run.is_main and rows:
        console = run.log.console
        console.print(as_table(rows, names=("before", "after"), title="What was kept", width=console.width))
        run.log.info(in_short(rows))
    return rows


def read(path: Path) -> list[Row]:
    """The rows of a run directory's forgetting.json; none without it."""
    return [Row.from_dict(row) for row in _read(path / FORGETTING).get("rows", [])]


def in_short(rows: Sequence[Row]) -> str:
    """``forgetting: 1 worse, 0 better, 5 cannot tell``."""
    worse = [row.name for row in rows if row.verdict == "worse"]
    counts = [f"{sum(row.verdict == v for row in rows)} {v}" for v in ("better", "cannot tell")]
    named = f" ({', '.join(worse)})" if worse else ""
    return f"forgetting: {len(worse)} worse{named}, {', '.join(counts)}"


def as_metrics(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """{"evaluator.metric": {"before", "after", "p", "verdict"}}, p adjusted over the table."""
    plain = {row.name: row.as_dict() for row in rows}
    return {
        name: {"before": row["a"], "after": row["b"], "p": row["p_adjusted"], "verdict": row["verdict"]}
        for name, row in plain.items()
    }


def as_markdown(
    rows: Sequence[Row],
    told: str = "What was kept, measured on the same samples before and after (p adjusted over the table, Holm):",
) -> str:
    """A section of the model card under the sentence ``told``; empty without rows."""
    if not rows:
        return ""
    lines = ["", told, ""]
    lines += ["| metric | before | after | difference, 95 % interval | p | verdict |", "|---|---|---|---|---|---|"]
    for row in rows:
        spread = "" if row.low is None else f" [{row.low:+.4f}, {row.high:+.4f}]"
        p = "" if row.p_adjusted is None else f"{row.p_adjusted:.2g}"
        values = f"{row.a:.4f} | {row.b:.4f} | {row.difference:+.4f}{spread}"
        lines.append(f"| {row.name} | {values} | {p} | {row.verdict} |")
    return "\n".join([*lines, ""])


def trains(config: BaseModel) -> bool:
    """Whether a recipe's config holds a training stage, or says by ``trains`` that its steps do."""
    if getattr(config, "trains", False):
        return True
    inner = [v for value in dict(config).values() for v in (value if isinstance(value, tuple | list) else (value,))]
    return isinstance(config, TrainConfig) or any(trains(v) for v in inner if isinstance(v, BaseModel))


def _chosen(run: Run) -> list[EvaluatorNode]:
    """The evaluators for this run's encoder; ``InputError`` where there is none."""
    wanted = run.config.evaluate.retention
    if not isinstance(wanted, str):
        return list(wanted)
    if wanted == "auto":
        offered = [r.name for r in run.registry.list("suite") if r.component.name == SUITE]
        if not offered:
            raise InputError(f"no plugin in use offers a suite named {SUITE}")
        if len(offered) > 1:
            raise InputError(f"{' and '.join(offered)} are both offered; name one")
        wanted = offered[0]
    nodes = open_suite(wanted, run.encoder, registry=run.registry)
    if not nodes:
        raise InputError(f"suite {wanted} has nothing to measure on {run.encoder.data.origin.uri}")
    return nodes


def _folder(run: Run, when: str) -> Path:
    return run.path / "evaluation" / f"retention-{when}"


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return found
