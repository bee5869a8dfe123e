"""The recipe ``merging/opcm``: fine-tune on each task from the base, then merge the models one after another.

Tang et al., Merging Models on the Fly Without Retraining, NeurIPS 2025, arXiv 2501.09522, with FusionBench's protocol:
the image tower is fine-tuned against the class names in words, and the words stay.
"""

from __future__ import annotations

import random
import shutil
from functools import partial
from pathlib import Path

from clipgraft.errors import InputError, Interrupted
from clipgraft.recipe import StagePlan
from clipgraft.runner import Run
from clipgraft.stage import JobStage, Stage, StageResult
from clipgraft_merging.opcm.settings import ContinualSettings, Method
from clipgraft_merging.recipes_merge.config import OpcmRunConfig, Task
from clipgraft_merging.recipes_merge.left_behind import FILE, switch_on
from clipgraft_merging.recipes_merge.matrix import Book, summary, write_matrix
from clipgraft_merging.recipes_merge.tuning import fine_tune
from clipgraft_merging.scores import Scores

MERGE = "merge"


class OpcmRecipe:
    """``task-NAME`` for each task that is fine-tuned, then ``merge``."""

    def __init__(self, config: OpcmRunConfig) -> None:
        self.config = config
        self._scores: Scores | None = None

    def plan(self) -> list[StagePlan]:
        """One stage per fine-tune, so that a resumed run makes none twice."""
        made = [
            StagePlan(f"task-{task.name}", partial(self._tune, task=task))
            for task in self.config.tasks
            if task.model is None
        ]
        return [*made, StagePlan(MERGE, lambda run: JobStage(MERGE, self._merge))]

    def check(self, run: Run) -> list[str]:
        """Settings that fit together, data that open, models that fit the base."""
        switch_on(run)
        problems = []
        try:
            for method in self.methods:
                self.settings(method)
            for reference in dict.fromkeys(r for t in self.config.tasks for r in (t.data, t.measure) if r is not None):
                run.open_source(reference)
            if models := [task.model for task in self.config.tasks if task.model is not None]:
                from clipgraft_merging.weights.engine import open_inputs

                open_inputs(models, base=self.config.model.from_, registry=run.registry)
        except InputError as error:
            problems.append(f"tasks: {error}")
        return problems

    @property
    def methods(self) -> list[Method]:
        """The one that is exported, then those it is compared with."""
        return list(dict.fromkeys((self.config.method, *self.config.compare)))

    def settings(self, method: Method) -> ContinualSettings:
        """Of a method, with the recipe's numbers."""
        c = self.config
        plain = method != "opcm"
        return ContinualSettings(
            method=method,
            alpha=c.alpha,
            mode=c.mode,
            qkv="split" if plain else c.qkv,
            compat="none" if plain else c.compat,
            scale=c.scale,
            density=c.density,
        )

    def orders(self, run: Run) -> list[list[str]]:
        """Task names; the first order is as listed when there is one only."""
        names = [task.name for task in self.config.tasks]
        if self.config.orders == 1:
            return [names]
        return [random.Random(f"{run.seed}/{k}").sample(names, len(names)) for k in range(self.config.orders)]

    def _tune(self, run: Run, *, task: Task) -> Stage:
        assert task.data is not None
        c = self.config
        return fine_tune(
            run, f"task-{task.name}", tuning=c.tuning, train=c.train, source=run.open_source(task.data), order=0
        )

    def model(self, run: Run, name: str) -> str:
        """The fine-tuned model of a task."""
        task = next(task for task in self.config.tasks if task.name == name)
        return task.model or str(run.stage_folder(f"task-{name}") / "result" / "encoder")

    def _merge(self, run: Run) -> StageResult:
        folder = run.stage_folder(MERGE)
        orders = self.orders(run)
        book = Book(folder / "accuracy.json", {"orders": orders, "methods": [*self.methods]}, writes=run.is_main)
        base = book.row(
            "base", lambda: self._measured(run, self.config.model.from_, [t.name for t in self.config.tasks])
        )
        steps = len(self.methods) * len(orders) * len(self.config.tasks)
        with run.log.progress("merging", steps) as bar:
            for method in self.methods:
                for k, order in enumerate(orders):
                    out = folder / f"{method}-{k}"
                    for t in range(1, len(order) + 1):
                        if run.stop_requested:
                            raise Interrupted(f"stopped in {MERGE}; continue with --resume {run.path}")
                        shown = (method, k) == (self.config.method, 0)  # in the picture; else what the means need
                        wanted = order[:t] if shown or t == len(order) else order[t - 1 : t]
                        book.row(f"{method}/{k}/{t}", partial(self._step, run, method, out, order[:t], wanted))
                        bar.advance(note=f"{method}, {order[t - 1]}")
                    if (method, k) != (self.config.method, 0):
                        shutil.rmtree(out, ignore_errors=True) if run.is_main else None
        told = {name: summary(book.rows, method=name, orders=orders) for name in self.methods}
        if run.is_main:
            methods = {name: s.as_dict() for name, s in told.items()}
            average = sum(base.values()) / len(base)
            write_matrix(
                folder, FILE, {"method": self.config.method, "base": average, "methods": methods}, book, orders[0]
            )
        run.accelerator.wait_for_everyone()
        return StageResult(
            encoder=run.open_encoder(str(folder / f"{self.config.method}-0")),
            metrics={f"{key}/{name}": value for name, s in told.items() for key, value in s.as_dict().items()},
        )

    def _step(self, run: Run, method: Method, out: Path, names: list[str], wanted: list[str]) -> dict[str, float]:
        """Merge the last of ``names`` into ``out`` unless that was done, and measure the tasks ``wanted``."""
        from clipgraft_merging.opcm.merger import merge_into, new_state
        from clipgraft_merging.opcm.state import read_state
        from clipgraft_merging.weights.engine import open_inputs

        if run.is_main:
            state = read_state(out) if len(names) > 1 else None
            if state is None or len(state.models) < len(names):
                inputs = open_inputs([self.model(run, names[-1])], base=self.config.model.from_, registry=run.registry)
                merge_into(out, inputs, state or new_state(inputs, self.settings(method)), registry=run.registry)
        run.accelerator.wait_for_everyone()
        return self._measured(run, str(out), wanted)

    def _measured(self, run: Run, model: str, names: list[str]) -> dict[str, float]:
        """{task: the judge's first metric}."""
        if self._scores is None:
            tasks = {task.name: task.measure for task in self.config.tasks}
            size = self.config.evaluate.batch_size
            self._scores = Scores(self.config.judge, data=tasks, registry=run.registry, batch_size=size)
        return self._scores.of(run.open_encoder(model), only=names)
