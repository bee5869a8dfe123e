"""A run: one recipe on one model and one data source, in one directory that tells the whole story."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from clipgraft import distributed, files
from clipgraft.config.schema import EvaluatorRef, RunConfig
from clipgraft.data.loader import TrainLoader
from clipgraft.encoders.base import Encoder
from clipgraft.errors import ClipgraftError, InputError, Interrupted
from clipgraft.log import RunLog
from clipgraft.recipe import Recipe, StagePlan
from clipgraft.registry import Registered, Registry, current
from clipgraft.runhooks import RunHooks
from clipgraft.stage import Stage, StageResult, TrainStage

if TYPE_CHECKING:
    from clipgraft.data.base import PairSource, Source
    from clipgraft.evaluation.base import Evaluation

LIBRARIES = ("clipgraft", "torch", "torchvision", "accelerate", "open_clip_torch", "safetensors", "numpy", "pillow")


@dataclass(frozen=True, slots=True)
class Result:
    """What ``run_recipe`` returns; ``metrics`` are those measured after the run, "evaluator.metric" -> value."""

    run: Path
    export: Path | None
    status: str
    steps: int
    metrics: dict[str, float]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "run": str(self.run),
            "export": None if self.export is None else str(self.export),
            "status": self.status,
            "steps": self.steps,
            "metrics": self.metrics,
            "seconds": round(self.seconds, 2),
        }


@dataclass
class Run:
    """The state of a run, passed to recipes, stages and hooks."""

    path: Path
    config: RunConfig
    recipe: Registered
    registry: Registry
    log: RunLog
    stop_requested: bool = False
    hooks: RunHooks = field(default_factory=RunHooks)
    _encoder: Encoder | None = None
    _plan: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.accelerator = distributed.make_accelerator(
            self.config.precision, trackers=self.config.trackers, folder=self.path
        )
        self.is_main, self.device, self.seed = self.accelerator.is_main_process, self.accelerator.device, self.config.seed
        self.log.is_main = self.is_main

    # -- what stages ask for -------------------------------------------------------------------------------------

    @property
    def encoder(self) -> Encoder:
        """The encoder as the stages so far left it; opened from ``config.model`` with the config's grafts at first."""
        if self._encoder is None:
            from clipgraft.encoders import apply_grafts

            self._encoder = apply_grafts(self.base_encoder(), self.config.grafts, registry=self.registry)
        return self._encoder

    @encoder.setter
    def encoder(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def base_encoder(self) -> Encoder:
        """A fresh copy of the encoder that the run started from, without grafts."""
        return self.open_encoder(self.config.model.from_)

    def open_encoder(self, uri: str) -> Encoder:
        """Any model reference, in eval mode on this run's device."""
        from clipgraft.encoders import load

        return load(uri, registry=self.registry).to(self.device).eval()

    def open_source(self, reference: str) -> Source:
        """Any data reference that holds samples."""
        from clipgraft.data import open_source

        source = open_source(reference, registry=self.registry, max_pixels=self.config.data.max_pixels)
        if hasattr(source, "patterns"):
            raise InputError(f"{reference} holds minimal pairs; training needs images (folder:, csv: or a dataset)")
        return source  # type: ignore[return-value]

    def train_source(self) -> Source:
        """The source of ``config.data``."""
        return self.open_source(self.config.data.from_)

    def component(self, stage: str, name: str) -> dict[str, torch.Tensor]:
        """Tensors that a finished stage left under ``name``, always read from disk."""
        return load_file(self.stage_folder(stage) / "result" / f"{name}.safetensors")

    def stage_folder(self, name: str) -> Path:
        """stages/<nn-name>, created on demand."""
        number = self._plan.index(name) if name in self._plan else len(self._plan)
        folder = self.path / "stages" / f"{number:02d}-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def train_loader(self, stage: TrainStage) -> TrainLoader:
        """The exact, resumable loader of a stage's source on this rank."""
        world = distributed.world_size()
        encoder = self.encoder
        return TrainLoader(
            stage.source,
            preprocess=encoder.preprocess,
            tokenizer=encoder.tokenizer if stage.wants_text else None,
            batch_size=stage.train_config.batch_size // world,
            seed=self.seed,
            rank=distributed.rank(),
            world=world,
            crop=stage.training_crop,
            workers=self.config.data.workers,
            max_bad=self.config.data.max_bad,
        )

    def seed_stage(self, name: str, *, per_rank: bool = False) -> None:
        """Seed Python's and torch's generators from (seed, stage, rank): a stage never depends on what ran before."""
        text = f"{self.seed}/{name}/{distributed.rank() if per_rank else 'build'}"
        value = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        random.seed(value)
        torch.manual_seed(value)

    # -- measuring -----------------------------------------------------------------------------------------------

    def evaluate(self, encoder: Encoder, nodes: Sequence[EvaluatorRef]) -> dict[str, Evaluation]:
        """The evaluators of ``nodes`` on ``encoder``."""
        from clipgraft.evaluation import evaluate

        settings = self.config.evaluate
        with torch.random.fork_rng():
            return evaluate(
                encoder,
                nodes,
                registry=self.registry,
                default_data=settings.data,
                batch_size=settings.batch_size,
                log=self.log,
            )

    def measure(self, when: str) -> dict[str, float]:
        """Run ``evaluate.on`` once for "before" or "after", write it, and return it flat; repeated calls read it."""
        path = self.path / "evaluations.json"
        stored = json.loads(path.read_text("utf-8")) if path.exists() else {}
        if self.config.evaluate.on and when not in stored:
            self.log.info(f"measuring {when} the run")
            found = self.evaluate(self.encoder, self.config.evaluate.on)
            stored[when] = {name: dict(e.metrics) for name, e in found.items()}
            if self.is_main:
                for name, evaluation in found.items():
                    file = self.path / "evaluation" / when / f"{name.replace('/', '-').replace('@', '--')}.jsonl"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    files.write_text(file, "".join(json.dumps(dict(row)) + "\n" for row in evaluation.samples))
                files.write_json(path, stored)
            distributed.barrier()
        return flat(stored.get(when, {}))

    def evaluate_during(self, stage: TrainStage, step: int) -> None:
        """Run ``evaluate.on`` and the hooks' ``on_evaluate`` inside a stage; one JSON line in evaluations.jsonl."""
        encoder = stage.current_encoder()
        found = self.evaluate(encoder, self.config.evaluate.on) if encoder is not None else {}
        metrics = flat({name: e.metrics for name, e in found.items()})
        for extra in self.hooks.call("on_evaluate", run=self, stage=stage, step=step):
            if double := metrics.keys() & extra.keys():
                raise ClipgraftError(f"two hooks report the metric {min(double)!r}; rename one")
            metrics |= extra
        if self.is_main and metrics:
            with (self.stage_folder(stage.name) / "evaluations.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.track(stage.name, step, metrics)

    def track(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """Send numbers to the trackers."""
        if self.config.trackers:
            self.accelerator.log({f"{stage}/{k}": v for k, v in values.items() if isinstance(v, int | float)}, step=step)

    # -- resuming ------------------------------------------------------------------------------------------------

    def save_hooks(self, stage: Stage) -> dict[str, Any]:
        """Each hook's own entry for the resume state, by hook name."""
        return {name: self.hooks.call_one(name, "on_save", run=self, stage=stage) for name in self.hooks.names("on_save")}

    def load_hooks(self, stage: Stage, state: Mapping[str, Any]) -> None:
        """Give every hook its entry back."""
        for name in self.hooks.names("on_load"):
            if name in state:
                self.hooks.call_one(name, "on_load", run=self, stage=stage, state=state[name])

    def finished(self, name: str) -> bool:
        """Whether a stage ended earlier and left a whole result."""
        return files.is_whole(self.stage_folder(name) / "result")

    def keep(self, plan: StagePlan, result: StageResult) -> None:
        """Write what a stage left, then drop its resume states."""
        from clipgraft.checkpoint import write_export

        folder = self.stage_folder(plan.name) / "result"
        if self.is_main:
            with files.whole_folder(folder) as new:
                for name, module in result.components.items():
                    files.write_tensors(new / f"{name}.safetensors", module.state_dict())
                files.write_json(new / "metrics.json", dict(result.metrics))
                files.write_json(new / "components.json", {k: m.registered for k, m in shipped(result).items()})
                if result.encoder is not None:
                    write_export(result.encoder, new / "encoder", lineage=self.lineage())
            import shutil

            shutil.rmtree(self.stage_folder(plan.name) / "state", ignore_errors=True)
        distributed.barrier()
        if result.encoder is not None:
            self._encoder = self.open_encoder(str(folder / "encoder"))

    def left_by(self, name: str) -> StageResult:
        """What a stage that ended in an earlier process left: its encoder and the components that ship."""
        folder = self.stage_folder(name) / "result"
        modules = {}
        for key, (registered, settings) in json.loads((folder / "components.json").read_text("utf-8")).items():
            modules[key] = self.registry.build("head", registered, settings)
            modules[key].load_state_dict(load_file(folder / f"{key}.safetensors"))
        encoder = folder / "encoder"
        return StageResult(self.open_encoder(str(encoder)) if encoder.exists() else None, modules)

    def lineage(self) -> list[dict[str, Any]]:
        """What this run adds to the encoder's own lineage; nothing once a stage of it has written the encoder."""
        base = self.encoder.data.origin
        if Path(base.uri).is_relative_to(self.path):
            return []
        return [{"recipe": self.recipe.name, "base": base.uri, "base_sha256": base.sha256, "seed": self.seed}]

    def status(self, status: str, **more: Any) -> None:
        """Write status.json."""
        if self.is_main:
            files.write_json(self.path / "status.json", {"recipe": self.recipe.name, "status": status, **more})


def shipped(result: StageResult) -> dict[str, Any]:
    """The components that belong into the export: those that say in ``registered`` = (name, config) who rebuilds them."""
    return {name: module for name, module in result.components.items() if hasattr(module, "registered")}


def flat(evaluations: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """{"core/pairs": {"mean": .3}} -> {"core/pairs.mean": .3}."""
    return {f"{name}.{metric}": value for name, metrics in evaluations.items() for metric, value in metrics.items()}


def run_recipe(
    recipe: str | None = None,
    *,
    configs: Sequence[Path] = (),
    overrides: Sequence[str] | Mapping[str, Any] = (),
    out: Path | str | None = None,
    resume: Path | str | None = None,
    seed: int | None = None,
    dry_run: bool = False,
    registry: Registry | None = None,
) -> Result:
    """Run ``RECIPE[:PRESET]`` with overrides ("a.b=c" strings or a mapping) into ``out``, or continue ``resume``.

    Raises ``InputError`` for bad input before any work, ``Interrupted`` after a stop request with the state saved.
    """
    from clipgraft.config.load import load_recipe, load_run

    registry = registry or current()
    if resume is not None:
        path = Path(resume)
        if overrides or configs or seed is not None:
            raise InputError("--resume continues a run as it was configured; start a new run to change settings")
        registered, config = load_run(path, registry=registry)
    else:
        if recipe is None:
            raise InputError("name a recipe, such as genhancer:tiny (clipgraft list recipes), or --resume DIR")
        changes = list(overrides) if not isinstance(overrides, Mapping) else [f"{k}={json.dumps(v)}" for k, v in overrides.items()]
        changes += [] if seed is None else [f"seed={seed}"]
        registered, config = load_recipe(recipe, files=configs, overrides=changes, registry=registry)
        path = Path(out) if out is not None else _new_folder(registered.name)
    if config.threads:
        torch.set_num_threads(config.threads)
    registry.requires(list(config.requires))
    plan_maker: Recipe = registry.resolve(registered.component.target)(config)
    run = Run(path=path, config=config, recipe=registered, registry=registry, log=RunLog())
    if problems := plan_maker.check(run):
        raise InputError("; ".join(problems))
    if dry_run:
        for stage in plan_maker.plan():
            run.log.info(f"would run stage {stage.name}")
        return Result(path, None, "dry-run", 0, {}, 0.0)
    _prepare_folder(run, resuming=resume is not None)
    return _execute(run, plan_maker)


def _execute(run: Run, recipe: Recipe) -> Result:
    from clipgraft.checkpoint import write_export

    began, stages = time.monotonic(), recipe.plan()
    run._plan = [p.name for p in stages]
    for node in run.config.hooks:
        run.hooks.register(run.registry.build("run-hook", node.use, node.settings), node.use)
    if run.config.trackers:
        run.accelerator.init_trackers(run.recipe.name.replace("/", "-"))
    try:
        with _stop_on_signals(run):
            run.status("running")
            run.hooks.call("on_run_start", run=run)
            run.measure("before")
            left: dict[str, torch.nn.Module] = {}
            for plan in stages:
                left |= shipped(_run_stage(run, plan))
            metrics = run.measure("after")
            export = run.path / "export"
            if run.is_main:
                run.log.info(f"writing {export}")
                write_export(run.encoder, export, components=left, lineage=run.lineage(), card=model_card(run, metrics))
            distributed.barrier()
    except BaseException as error:
        stopped = isinstance(error, Interrupted)
        run.status("interrupted" if stopped else "failed", error=f"{type(error).__name__}: {error}")
        run.hooks.call("on_error", run=run, error=error)
        raise
    finally:
        run.hooks.call("on_run_end", run=run)
        if run.config.trackers:
            run.accelerator.end_training()
    seconds = time.monotonic() - began
    steps = sum(_steps(run.stage_folder(p.name) / "metrics.jsonl") for p in stages)
    run.status("done", seconds=round(seconds, 2), steps=steps)
    return Result(run.path, export, "done", steps, metrics, seconds)


def _run_stage(run: Run, plan: StagePlan) -> StageResult:
    """Build and run one stage, or take up what it left when it ended in an earlier process."""
    if run.finished(plan.name):
        run.log.info(f"{plan.name}: already done")
        result = run.left_by(plan.name)
        run.encoder = result.encoder or run.encoder
        return result
    run.seed_stage(plan.name)
    stage = plan.build(run)
    run.hooks.call("on_stage_start", run=run, stage=stage)
    result = stage.run(run)
    run.keep(plan, result)
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
    taken = [int(p.name.rsplit("-", 1)[-1]) for p in base.parent.glob(f"{base.name}-*") if p.name.rsplit("-", 1)[-1].isdigit()]
    return base.with_name(f"{base.name}-{max(taken, default=0) + 1}")


def _prepare_folder(run: Run, *, resuming: bool) -> None:
    """Create the run directory and write what describes the run; a new run never overwrites another."""
    if run.is_main:
        if not resuming and run.path.exists() and any(run.path.iterdir()):
            raise InputError(f"{run.path} is not empty; continue it with --resume {run.path}, or choose another --out")
        try:
            run.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"can't create {run.path}: {error.strerror}; choose a writable --out") from error
        run.log.path = run.path / "log.txt"
        if not resuming:
            from clipgraft.config.load import dump_yaml

            files.write_text(run.path / "config.yaml", dump_yaml(run.config))
            files.write_text(run.path / "command.txt", " ".join(sys.argv) + "\n")
        files.write_json(run.path / "env.json", environment(run))
        files.write_json(run.path / "plugins.json", run.registry.freeze())
    distributed.barrier()


def environment(run: Run) -> dict[str, Any]:
    """Versions and hardware, to tell why two runs differ."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(run.device),
        "processes": distributed.world_size(),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def model_card(run: Run, metrics: Mapping[str, float]) -> str:
    """README.md of the export: what it is, what was done, what was measured."""
    before = run.measure("before")
    rows = "".join(f"| {name} | {before.get(name, float('nan')):.4f} | {value:.4f} |\n" for name, value in metrics.items())
    table = f"\n| metric | before | after |\n|---|---|---|\n{rows}" if rows else "\nNothing was measured in this run.\n"
    paper = f"\nMethod: {run.recipe.component.paper}\n" if run.recipe.component.paper else ""
    return (
        f"# {run.recipe.name} on {run.config.model.from_}\n\n{run.recipe.component.summary}\n{paper}"
        f"\nData: `{run.config.data.from_}`. Seed {run.seed}.\n{table}"
    )


def _steps(path: Path) -> int:
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0
