"""Running a recipe: check, measure, stages, measure, export; resume where an earlier process stopped."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from clipgraft import distributed, environment, files, launching, performance, retention
from clipgraft.errors import ClipgraftError, InputError, Interrupted, lost_process
from clipgraft.log import RunLog
from clipgraft.recipe import Recipe, StagePlan
from clipgraft.registry import Registry, current
from clipgraft.runner import Run, shipped
from clipgraft.stage import StageResult


@dataclass(frozen=True, slots=True)
class Result:
    """What ``run_recipe`` returns; ``metrics`` are those measured after the run, "evaluator.metric" -> value.

    ``forgetting``: "evaluator.metric" -> {"before", "after", "p", "verdict"} of ``evaluate.retention``.
    """

    run: Path
    export: Path | None
    status: str
    steps: int
    metrics: dict[str, float]
    seconds: float
    forgetting: dict[str, dict[str, Any]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "run": str(self.run),
            "export": None if self.export is None else str(self.export),
            "status": self.status,
            "steps": self.steps,
            "metrics": self.metrics,
            "forgetting": self.forgetting,
            "seconds": round(self.seconds, 2),
        }


def run_recipe(
    recipe: str | None = None,
    *,
    configs: Sequence[Path] = (),
    overrides: Sequence[str] | Mapping[str, Any] = (),
    out: Path | str | None = None,
    resume: Path | str | None = None,
    repeat: Path | str | None = None,
    seed: int | None = None,
    dry_run: bool = False,
    registry: Registry | None = None,
) -> Result:
    """Run ``RECIPE[:PRESET]`` with overrides ("a.b=c" strings or a mapping) into ``out``, or continue ``resume``.

    ``repeat`` is a run directory, or the config.yaml in it: the same recipe with the same config, apart from overrides.
    What is otherwise than it was then is told; at the end the weights of both are compared.

    Raises ``InputError`` for bad input before any work, ``Interrupted`` after a stop request with the state saved.
    """
    from clipgraft.config.load import load_recipe, load_run, run_folder

    registry, other = registry or current(), None if repeat is None else run_folder(Path(repeat))
    changes = [f"{k}={json.dumps(v)}" for k, v in overrides.items()] if isinstance(overrides, Mapping) else [*overrides]
    changes += [] if seed is None else [f"seed={seed}"]
    if resume is not None:
        path = Path(resume)
        if changes or configs or other is not None:
            raise InputError("--resume continues a run as it was configured; start a new run to change settings")
        registered, config = load_run(path, registry=registry)
    else:
        if other is not None and (recipe is not None or configs):
            raise InputError("--from RUN knows its recipe and settings; leave RECIPE and --config out, or use --set")
        if other is not None:
            registered, config = load_run(other, overrides=changes, registry=registry)
        elif recipe is None:
            raise InputError("name a recipe, such as genhancer:tiny (clipgraft list recipes), or --resume DIR")
        else:
            registered, config = load_recipe(recipe, files=configs, overrides=changes, registry=registry)
        retention.check(config, registry=registry)
        path = Path(out) if out is not None else _new_folder(registered.name)
    if config.threads:
        torch.set_num_threads(config.threads)
    registry.requires(list(config.requires))
    config, settled = performance.settled(config)
    plan_maker: Recipe = registry.resolve(registered.component.target)(config)
    run = Run(path=path, config=config, recipe=registered, registry=registry, log=RunLog())
    if problems := plan_maker.check(run):
        raise InputError("; ".join(problems))
    told = environment.differences(other, run) if other is not None else []
    if dry_run:
        for line in settled + [f"otherwise than in {other}: {line}" for line in told]:
            run.log.info(line)
        if run.layout != launching.Layout():
            run.log.info(f"would need {run.layout}")
        for stage in plan_maker.plan():
            run.log.info(f"would run stage {stage.name}{stage.about and f' ({stage.about})'}")
        return Result(path, None, "dry-run", 0, {}, 0.0)
    launching.refuse_fewer(run.layout)
    _prepare_folder(run, resuming=resume is not None)
    for line in settled:
        run.log.info(line)
    if other is not None and run.is_main:
        files.write_json(run.path / environment.REPEAT, {"of": str(other.resolve()), "differences": told})
        for line in told:
            run.log.info(f"otherwise than in {other}: {line}")
    return _execute(run, plan_maker)


def _execute(run: Run, recipe: Recipe) -> Result:
    from clipgraft.card import told_by
    from clipgraft.checkpoint import write_export

    began, stages = time.monotonic(), recipe.plan()
    run._plan = [p.name for p in stages]
    for node in run.config.hooks:
        run.hooks.register(run.registry.build("run-hook", node.use, node.settings), node.use)
    if run.config.trackers:
        run.accelerator.init_trackers(run.recipe.name.replace("/", "-"))
    try:
        kernels = performance.kernels(run.config.performance)
        with _stop_on_signals(run), environment.determinism(run.config.deterministic), kernels:
            run.status("running")
            run.hooks.call("on_run_start", run=run)
            run.measure("before")
            retention.before(run)
            left: dict[str, torch.nn.Module] = {}
            for plan in stages:
                left |= shipped(_run_stage(run, plan))
                if run.config.evaluate.every_stage and plan is not stages[-1]:
                    run.measure(f"after-{plan.name}")
            metrics, kept = run.measure("after"), retention.after(run)
            export = run.path / "export"
            if run.is_main:
                run.log.info(f"writing {export}")
                write_export(run.encoder, export, components=left, lineage=run.lineage(), card=told_by(run, kept))
                for line in environment.compare_results(run):
                    run.log.info(line)
            distributed.barrier()
    except BaseException as found:
        lost = lost_process(found)
        error = ClipgraftError(f"{lost}; continue with --resume {run.path}") if lost else found
        stopped = isinstance(error, Interrupted)
        with suppress(OSError):  # a disk that is full must not hide why
            run.status("interrupted" if stopped else "failed", error=f"{type(error).__name__}: {error}")
        run.hooks.call("on_error", run=run, error=error)
        if error is found:
            raise
        raise error from found
    finally:
        run.hooks.call("on_run_end", run=run)
        if run.config.trackers:
            run.accelerator.end_training()
    seconds = time.monotonic() - began
    steps = sum(_steps(run.stage_folder(p.name) / "metrics.jsonl") for p in stages)
    steps += sum(json.loads(inner.read_text("utf-8"))["steps"] for inner in run.path.glob("steps/*/status.json"))
    run.status("done", seconds=round(seconds, 2), steps=steps)
    return Result(run.path, export, "done", steps, metrics, seconds, retention.as_metrics(kept))


def _run_stage(run: Run, plan: StagePlan) -> StageResult:
    """Build and run one stage, or take up what it left when it ended in an earlier process."""
    if run.finished(plan.name):
        run.log.info(f"{plan.name}: already done")
        files.remove_folder(run.stage_folder(plan.name) / "state")  # of one that was killed in between
        result = run.left_by(plan.name)
        run.encoder = result.encoder or run.encoder
        return result
    run.seed_stage(plan.name)
    stage = plan.build(run)
    run.hooks.call("on_stage_start", run=run, stage=stage)
    result = stage.run(run)
    run.keep(plan, result)
    if run.trained_on and run.is_main:
        files.write_json(run.path / environment.DATA, run.trained_on)
    run.hooks.call("on_stage_end", run=run, stage=stage, result=result)
    return result


@contextmanager
def _stop_on_signals(run: Run) -> Iterator[None]:
    """SIGINT and SIGTERM set a flag that the trainer reads at the next step; a second one ends the process at once."""

    def handle(number: int, _frame: Any) -> None:
        if run.stop_requested:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        run.stop_requested = True

    try:
        old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: the caller's signals stay the caller's
        old = {}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _new_folder(recipe: str) -> Path:
    base = Path("runs") / recipe.split("/")[-1]
    taken = [
        int(p.name.rsplit("-", 1)[-1])
        for p in base.parent.glob(f"{base.name}-*")
        if p.name.rsplit("-", 1)[-1].isdigit()
    ]
    return base.with_name(f"{base.name}-{max(taken, default=0) + 1}")


def _prepare_folder(run: Run, *, resuming: bool) -> None:
    """Create the run directory and write what describes the run; a new run never overwrites another."""
    if run.is_main:
        if not resuming and run.path.exists() and not _begun_at_most(run.path):
            raise InputError(f"{run.path} is not empty; continue it with --resume {run.path}, or choose another --out")
        try:
            run.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"can't create {run.path}: {error.strerror}; choose a writable --out") from error
        run.log.path = run.path / "log.txt"
        try:
            for left in run.path.rglob(".*.tmp"):  # of writes that were killed
                left.unlink()
            files.write_json(run.path / environment.ENVIRONMENT, environment.environment(run))
            files.write_json(run.path / environment.PLUGINS, run.registry.freeze())
            if not resuming:
                from clipgraft.config.load import dump_yaml

                files.write_text(run.path / "command.txt", shlex.join(sys.argv) + "\n")
                files.write_text(run.path / "config.yaml", dump_yaml(run.config))
        except OSError as error:
            raise InputError(
                f"can't write in {run.path}: {error.strerror}; make room or choose another --out"
            ) from error
    distributed.barrier()


def _begun_at_most(path: Path) -> bool:
    """Whether all that is there was written before a run's status: one that was killed so early is begun anew.

    A config.yaml alone is somebody's own.
    """
    names = {file.name for file in path.iterdir() if not (file.name.startswith(".") and file.name.endswith(".tmp"))}
    told = {environment.ENVIRONMENT, environment.PLUGINS, environment.REPEAT, "command.txt", "config.yaml", "log.txt"}
    return names <= told and (not names or environment.ENVIRONMENT in names)


def _steps(path: Path) -> int:
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0
