"""A run: one recipe on one model and one data source, in one directory that tells the whole story."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from clipgraft import distributed, files, launching
from clipgraft.config.schema import EvaluatorRef, RunConfig
from clipgraft.data.loader import TrainLoader
from clipgraft.data.sampling import plan
from clipgraft.encoders.base import Encoder
from clipgraft.errors import ClipgraftError, InputError
from clipgraft.evaluation import records
from clipgraft.evaluation.comparison import tallies
from clipgraft.log import RunLog
from clipgraft.recipe import StagePlan
from clipgraft.registry import Registered, Registry
from clipgraft.runhooks import RunHooks
from clipgraft.stage import Stage, StageResult, TrainStage

if TYPE_CHECKING:
    from clipgraft.data.base import Source
    from clipgraft.evaluation.base import Evaluation
    from clipgraft.sharding import Shards


@dataclass
class Run:
    """The state of a run, passed to recipes, stages and hooks."""

    path: Path
    config: RunConfig
    recipe: Registered
    registry: Registry
    log: RunLog
    stop_requested: bool = False
    shards: Shards | None = None
    trained_on: dict[str, Any] = field(default_factory=dict)
    hooks: RunHooks = field(default_factory=RunHooks)
    _encoder: Encoder | None = None
    _plan: list[str] = field(default_factory=list)
    _classifiers: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.accelerator = distributed.make_accelerator(
            self.config.precision, trackers=self.config.trackers, folder=self.path
        )
        self.is_main, self.device, self.seed = (
            self.accelerator.is_main_process,
            self.accelerator.device,
            self.config.seed,
        )
        self.log.is_main, self.layout = self.is_main, launching.layout(self.config)

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
        return source

    def train_source(self) -> Source:
        """The source of ``config.data``, without what ``data.exclude`` lists."""
        from clipgraft.data.exclude import exclude

        data = self.config.data
        source = self.open_source(data.from_)
        self.trained_on = {"from": data.from_, "samples": len(source), "fingerprint": source.fingerprint}
        return source if data.exclude is None else exclude(source, data.exclude, log=self.log)

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
        world, data, encoder = distributed.world_size(), self.config.data, self.encoder
        return TrainLoader(
            stage.source,
            preprocess=encoder.preprocess,
            tokenizer=encoder.tokenizer if stage.wants_text else None,
            batch_size=stage.train_config.batch_size // world,
            seed=self.seed,
            rank=distributed.rank(),
            world=world,
            crop=stage.training_crop,
            workers=data.workers,
            max_bad=data.max_bad,
            plan=plan(
                stage.source,
                balance=data.balance,
                neighbours=None if data.neighbours is None else Path(data.neighbours).expanduser(),
                cluster=data.cluster,
                missing=data.max_bad,
                log=self.log,
            ),
        )

    def whole(self) -> AbstractContextManager[None]:
        """In here the weights of the stage in training are plain tensors, also where ranks hold parts; all enter it."""
        return nullcontext() if self.shards is None else self.shards.whole()

    def seed_stage(self, name: str, *, per_rank: bool = False) -> None:
        """Seed Python's and torch's generators from (seed, stage, rank): a stage never depends on what ran before."""
        text = f"{self.seed}/{name}/{distributed.rank() if per_rank else 'build'}"
        value = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        random.seed(value)
        torch.manual_seed(value)

    # -- measuring -----------------------------------------------------------------------------------------------

    def evaluate(
        self, encoder: Encoder, nodes: Sequence[EvaluatorRef], *, spread: bool = True
    ) -> dict[str, Evaluation]:
        """The evaluators of ``nodes`` on ``encoder``; with ``spread`` their intervals too."""
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
                classifiers=self._classifiers,
                spread=spread,
                precision="bf16" if settings.precision == "bf16" else "fp32",
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
                records.save(self.path / "evaluation" / when, found)
                files.write_json(path, stored)
                with suppress(ClipgraftError):  # what was measured before may be gone
                    before = records.read(self.path / "evaluation" / "before") if when == "after" else {}
                    for tally in tallies(before, found):
                        self.log.info(str(tally))
            distributed.barrier()
        return flat(stored.get(when, {}))

    def evaluate_during(self, stage: TrainStage, step: int) -> None:
        """Run ``evaluate.on`` and the hooks' ``on_evaluate`` inside a stage; one JSON line in evaluations.jsonl."""
        encoder = stage.current_encoder()
        on = self.config.evaluate.on
        found = self.evaluate(encoder, on, spread=False) if encoder is not None else {}  # only metrics are kept
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
            self.accelerator.log(
                {f"{stage}/{k}": v for k, v in values.items() if isinstance(v, int | float)}, step=step
            )

    # -- resuming ------------------------------------------------------------------------------------------------

    def save_hooks(self, stage: Stage) -> dict[str, Any]:
        """Each hook's own entry for the resume state, by hook name."""
        return {
            name: self.hooks.call_one(name, "on_save", run=self, stage=stage) for name in self.hooks.names("on_save")
        }

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
            files.remove_folder(self.stage_folder(plan.name) / "state")
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
        # an export of ours knows its file's hash; of other bases the tensors are hashed
        sha256 = base.sha256 or files.tensors_digest(self.base_encoder().state_dict())
        data = self.config.data.from_
        return [{"recipe": self.recipe.name, "base": base.uri, "base_sha256": sha256, "data": data, "seed": self.seed}]

    def status(self, status: str, **more: Any) -> None:
        """Write status.json."""
        if self.is_main:
            files.write_json(self.path / "status.json", {"recipe": self.recipe.name, "status": status, **more})


def shipped(result: StageResult) -> dict[str, Any]:
    """The components that belong into the export: they say in ``registered`` = (name, config) who rebuilds them."""
    return {name: module for name, module in result.components.items() if hasattr(module, "registered")}


def flat(evaluations: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """{"core/pairs": {"mean": .3}} -> {"core/pairs.mean": .3}."""
    return {f"{name}.{metric}": value for name, metrics in evaluations.items() for metric, value in metrics.items()}
