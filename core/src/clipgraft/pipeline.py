"""The recipe ``pipeline``: recipes one after another, each on the model that the step before it left.

A step is a whole run in ``steps/NN-name``, with config, log, resume states and export. So it gives, bit for bit, what
its recipe gives by hand on the same model and seed; an interrupted step goes on where it was; each has its own report.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Field, model_validator
from torch import nn

from clipgraft import distributed, performance, retention
from clipgraft.config.load import assign, complete, gather, load_run, merge
from clipgraft.config.schema import Config, DataConfig, RunConfig
from clipgraft.errors import ClipgraftError, InputError, Interrupted
from clipgraft.log import RunLog
from clipgraft.manifests import one_line
from clipgraft.recipe import Recipe, StagePlan
from clipgraft.registry import Registered, Registry
from clipgraft.runner import Run
from clipgraft.spec import runhook
from clipgraft.stage import JobStage, StageResult

START, OWN = "start", "steps"
SHARED = ("data", "precision", "performance", "threads", "deterministic", "distributed")
"""What the pipeline gives to every step when it isn't the default; its model and its seed are always given."""


class StepConfig(Config):
    """One recipe of a pipeline."""

    recipe: str = Field(description="RECIPE[:PRESET]")
    name: str | None = Field(
        None, pattern=r"^[a-z0-9][a-z0-9._-]*$", description="for @NAME and messages; null takes the recipe's"
    )
    set: dict[str, Any] = Field(
        default_factory=dict, description="settings over the preset's; '@start' and '@NAME' are models of the pipeline"
    )
    measure: bool = Field(False, description="also measure what the step's preset measures, before and after the step")
    late: bool = Field(False, description="check it at its turn only, because an earlier step changes the architecture")

    @property
    def called(self) -> str:
        """Its name."""
        return self.name or self.recipe.partition(":")[0].rpartition("/")[2]


def _as_step(value: Any) -> Any:
    if isinstance(value, dict) and "use" in value:  # what ``--set steps.0.set.KEY`` makes of a name alone
        return {"recipe": value["use"], **{key: inner for key, inner in value.items() if key != "use"}}
    return {"recipe": value} if isinstance(value, str) else value


class PipelineConfig(RunConfig):
    """Settings of ``core/pipeline``."""

    trains: ClassVar[bool] = True
    data: DataConfig = Field(
        DataConfig(**{"from": OWN}), description="for all steps; from: steps leaves them their own"
    )
    steps: tuple[Annotated[StepConfig, BeforeValidator(_as_step)], ...] = Field(
        min_length=1,
        description="each RECIPE[:PRESET], or {recipe, set, name, measure, late}; it starts from the model before it",
    )

    @model_validator(mode="after")
    def _names(self) -> Self:
        names = [START, *(step.called for step in self.steps)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two models of the pipeline are called {twice[0]}; give each step a name of its own")
        return self


class Pipeline:
    """One stage per step."""

    def __init__(self, config: PipelineConfig) -> None:
        self.config = config
        self.inside: dict[str, str] = {}  # the stages of each step that was checked, in words

    def plan(self) -> list[StagePlan]:
        """The steps."""
        builds = [partial(self._build, number=number) for number in range(len(self.config.steps))]
        return [
            StagePlan(step.called, build, self.inside.get(step.called, ""))
            for step, build in zip(self.config.steps, builds, strict=True)
        ]

    def check(self, run: Run) -> list[str]:
        """Every problem of every step; the model that the pipeline starts from stands for those that are to come."""
        run.hooks.register(_TakesUp(self), "the pipeline's model")
        problems = [
            f"{key} belong to a step; move them to steps.N.set.{key}"
            for key in ("grafts", "trackers")
            if getattr(self.config, key)
        ]
        models = {START: self.config.model.from_}
        for number, step in enumerate(self.config.steps):
            stood = [f" (checked on @start; if an earlier step changes that, set steps.{number}.late to true)"] * bool(
                number
            )
            if self.done(run, number):
                models[step.called] = str(self.export(run, number))
                continue
            try:
                inner, recipe = self._open(run, number, models)
                found = [] if step.late else recipe.check(inner)
                self.inside[step.called] = f"{step.recipe}: {', '.join(plan.name for plan in recipe.plan())}"
            except ClipgraftError as error:
                found, stood = [str(error)], []
            problems += [f"step {step.called}: {problem}" for problem in found] + stood * bool(found)
            models[step.called] = self.config.model.from_
        return problems

    def folder(self, run: Run, number: int) -> Path:
        """The run directory of a step."""
        return run.path / "steps" / f"{number:02d}-{self.config.steps[number].called}"

    def export(self, run: Run, number: int) -> Path:
        """The model that a step leaves."""
        return self.folder(run, number) / "export"

    def done(self, run: Run, number: int) -> bool:
        """Whether a step ended."""
        status = self.folder(run, number) / "status.json"
        return status.is_file() and json.loads(status.read_text("utf-8"))["status"] == "done"

    def _open(self, run: Run, number: int, models: Mapping[str, str]) -> tuple[Run, Recipe]:
        """A step as a run of its own, new or as it was configured when it began; nothing is done."""
        folder, step = self.folder(run, number), self.config.steps[number]
        if (folder / "status.json").is_file():
            registered, config = load_run(folder, registry=run.registry)
        else:
            registered, config = step_config(self.config, step, models=models, registry=run.registry)
        retention.check(config, registry=run.registry)
        run.registry.requires(list(config.requires))
        config, _ = performance.settled(config)
        recipe: Recipe = run.registry.resolve(registered.component.target)(config)
        return Run(path=folder, config=config, recipe=registered, registry=run.registry, log=RunLog()), recipe

    def _build(self, run: Run, *, number: int) -> JobStage:
        return JobStage(self.config.steps[number].called, partial(self._run, number=number))

    def _run(self, run: Run, *, number: int) -> StageResult:
        """Run a step, or go on with it; its export is the pipeline's model from then on."""
        from clipgraft.execution import _execute, _prepare_folder

        step, folder, last = self.config.steps[number], self.folder(run, number), number + 1 == len(self.config.steps)
        if distributed.any_rank(run.stop_requested):
            raise Interrupted(f"stopped before step {step.called}; continue with --resume {run.path}")
        run.log.info(f"step {step.called} ({number + 1} of {len(self.config.steps)}): {step.recipe} in {folder}")
        models = {s.called: str(self.export(run, k)) for k, s in enumerate(self.config.steps[:number])}
        began = distributed.any_rank((folder / "status.json").is_file())
        if not began and run.is_main:
            shutil.rmtree(folder, ignore_errors=True)  # a process died before it had written anything worth keeping
        distributed.barrier()
        run._encoder = None  # the step has its own; this one would only take memory
        with _named(step, run.path):
            inner, recipe = self._open(run, number, {START: self.config.model.from_, **models})
            if problems := recipe.check(inner):
                raise InputError("; ".join(problems))
            _prepare_folder(inner, resuming=began)
            try:
                metrics = _execute(inner, recipe).metrics
            finally:
                run.stop_requested |= inner.stop_requested
        run.encoder = run.open_encoder(str(self.export(run, number)))
        return StageResult(components=self._components(run) if last else {}, metrics=metrics)

    def _components(self, run: Run) -> dict[str, nn.Module]:
        """What steps trained beside the encoder, as far as it was for exactly the weights that the last step leaves."""
        from clipgraft.checkpoint import read_component, read_manifest

        found: dict[str, nn.Module] = {}
        final = ""
        for number in reversed(range(len(self.config.steps))):
            folder = self.export(run, number)
            manifest = read_manifest(folder)
            weights = manifest["files"][manifest["encoder"]["weights"]]["sha256"]
            final = final or weights
            for record in manifest["components"]:
                if weights != final or record["name"] in found:
                    why = (
                        "the encoder was changed after it" if weights != final else "a later step has one of that name"
                    )
                    run.log.info(f"{record['name']} stays in {folder}: {why}")
                elif record["use"]:
                    module = run.registry.build("head", record["use"], record["config"])
                    module.load_state_dict(read_component(folder, record["name"]))
                    found[record["name"]] = module
        return found


class _TakesUp:
    """Lifecycle hook: in a resumed pipeline, the model is what the last finished step left."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline

    @runhook
    def on_run_start(self, run: Run) -> None:
        """Stages that ended are passed over, and none of them hands the model on."""
        ended = [number for number, step in enumerate(self.pipeline.config.steps) if run.finished(step.called)]
        if ended:
            run.encoder = run.open_encoder(str(self.pipeline.export(run, ended[-1])))


def step_config(
    pipeline: PipelineConfig, step: StepConfig, *, models: Mapping[str, str], registry: Registry
) -> tuple[Registered, RunConfig]:
    """Recipe and config of a step: its preset < what the pipeline says for all < its own ``set``.

    ``models``: reference by name, the newest last; that one is the step's model unless ``set`` has another.
    """
    recipe, values = gather(step.recipe, registry=registry)
    shared = pipeline.model_dump(mode="json", by_alias=True, exclude_defaults=True, include={*SHARED})
    if pipeline.data.from_ == OWN and "data" in shared:
        del shared["data"]["from"]
    values = merge(values, {**shared, "model": {"from": [*models.values()][-1]}, "seed": pipeline.seed})
    if not step.measure:
        evaluate = values.get("evaluate") or {}
        values["evaluate"] = {**evaluate, "on": [], "retention": "none"}
    for key, value in step.set.items():
        known = _known(value, models)
        if isinstance(known, dict):
            inner: dict[str, Any] = {}
            assign(inner, f"{key}={json.dumps(known)}")
            values = merge(values, inner)
        else:
            assign(values, f"{key}={json.dumps(known)}")
    return recipe, complete(recipe, values, registry=registry)


def _known(value: Any, models: Mapping[str, str]) -> Any:
    """``value`` with every "@NAME" in it replaced by that model's reference."""
    if isinstance(value, dict):
        return {key: _known(inner, models) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_known(inner, models) for inner in value]
    if not isinstance(value, str) or not re.fullmatch(r"@[\w.-]+", value):
        return value
    if value[1:] not in models:
        raise InputError(f"{value} is no model before this step; known: {', '.join(f'@{name}' for name in models)}")
    return models[value[1:]]


@contextmanager
def _named(step: StepConfig, path: Path) -> Iterator[None]:
    """Errors say in which step, and a stop says how the whole goes on."""
    try:
        yield
    except Interrupted as error:
        raise Interrupted(
            f"step {step.called}: {str(error).partition(';')[0]}; continue with --resume {path}"
        ) from None
    except ClipgraftError as error:
        error.args = (f"step {step.called}: {error}",)
        raise
    except Exception as error:
        raise ClipgraftError(f"step {step.called}: {one_line(error)}; --debug shows the traceback") from error
