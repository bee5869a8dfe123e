"""The recipe ``merging/soup``: fine-tunes of one base, one stage each, and then their soup.

Wortsman et al., Model soups, ICML 2022, arXiv 2203.05482.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from clipgraft import files
from clipgraft.errors import InputError
from clipgraft.recipe import StagePlan
from clipgraft.runner import Run
from clipgraft.stage import JobStage, Stage, StageResult
from clipgraft_merging.recipes_merge.config import SoupRunConfig, Variation
from clipgraft_merging.recipes_merge.left_behind import FILE, switch_on
from clipgraft_merging.recipes_merge.tuning import fine_tune

if TYPE_CHECKING:
    from clipgraft_merging.weights.engine import Merger

SOUP = "soup"


class SoupRecipe:
    """``ingredient-N`` for each fine-tune, then ``soup``."""

    def __init__(self, config: SoupRunConfig) -> None:
        self.config = config

    def plan(self) -> list[StagePlan]:
        """One stage per fine-tune, so that a resumed run makes none twice."""
        made = [
            StagePlan(f"ingredient-{k}", partial(self._tune, variation=v, name=f"ingredient-{k}"))
            for k, v in enumerate(self.config.ingredients, 1)
            if isinstance(v, Variation)
        ]
        return [*made, StagePlan(SOUP, lambda run: JobStage(SOUP, self._soup))]

    def check(self, run: Run) -> list[str]:
        """Data that open, and models that can be merged with the base."""
        switch_on(run)
        problems = []
        c = self.config
        references = [v.data for v in c.ingredients if isinstance(v, Variation) and v.data] + [c.judge.data]
        if any(isinstance(v, Variation) and v.data is None for v in c.ingredients):
            references.append(c.data.from_)
        for reference in dict.fromkeys(r for r in references if r is not None):
            try:
                run.open_source(reference)
            except InputError as error:
                problems.append(str(error))
        if models := [v for v in c.ingredients if isinstance(v, str)]:
            from clipgraft_merging.weights.engine import open_inputs

            try:
                open_inputs(models, base=c.model.from_, registry=run.registry)
            except InputError as error:
                problems.append(f"ingredients: {error}")
        return problems

    def _tune(self, run: Run, *, variation: Variation, name: str) -> Stage:
        c = self.config
        source = run.train_source() if variation.data is None else run.open_source(variation.data)
        return fine_tune(
            run,
            name,
            tuning=variation.tuning(c.tuning),
            train=variation.train(c.train),
            source=source,
            order=variation.order,
        )

    def references(self, run: Run) -> list[str]:
        """Every ingredient, in order."""
        return [
            v if isinstance(v, str) else str(run.stage_folder(f"ingredient-{k}").absolute() / "result" / "encoder")
            for k, v in enumerate(self.config.ingredients, 1)
        ]

    def _summed(self) -> Merger:
        """The method that needs no judge."""
        from clipgraft_merging.soup.uniform import UniformSoup
        from clipgraft_merging.task_arithmetic.arithmetic import TaskArithmetic
        from clipgraft_merging.ties.merger import Ties

        c = self.config
        if c.soup == "task-arithmetic":
            return TaskArithmetic(scales=(0.3 if c.scale is None else c.scale,))
        if c.soup == "ties":
            return Ties(density=c.density, scale=1.0 if c.scale is None else c.scale)
        return UniformSoup()

    def _soup(self, run: Run) -> StageResult:
        from clipgraft_merging.soup.greedy import GreedyRule, GreedySoup, search
        from clipgraft_merging.soup.judge import EvaluatorJudge
        from clipgraft_merging.soup.uniform import UniformSoup
        from clipgraft_merging.weights.engine import merge_state, merge_to, open_inputs

        c, models, folder = self.config, self.references(run), run.stage_folder(SOUP)
        inputs = open_inputs(models, base=c.model.from_, registry=run.registry)
        merger = self._summed()
        alone: list[float] = []
        if c.judge.data is not None:
            judge = EvaluatorJudge(
                inputs.described,
                c.judge.on,
                registry=run.registry,
                data=c.judge.data,
                metric=c.judge.metric,
                batch_size=c.evaluate.batch_size,
                log=run.log,
            )
            if c.soup == "greedy":  # every process judges alike, each keeps a ledger of its own
                ledger = folder / ("greedy.json" if run.is_main else f"greedy-{run.accelerator.process_index}.json")
                merger = search(inputs, judge, rule=GreedyRule(), ledger=ledger, log=run.log)
                alone = [float(merger.search["alone"][str(k)]) for k in range(len(models))]
            else:
                with run.log.progress("judging ingredients", len(models)) as bar:
                    for model in models:
                        one = open_inputs([model], registry=run.registry)
                        alone.append(judge(merge_state(one, UniformSoup())))
                        bar.advance(note=f"{alone[-1]:.4f}")
        chosen = max(range(len(models)), key=lambda k: (alone[k], -k)) if alone else None
        if c.soup == "best":
            assert chosen is not None  # judge.data is required
            merger = GreedySoup(ingredients=[chosen], search={"held_out": alone})
        if run.is_main:
            merge_to(folder / "merged", inputs, merger, log=run.log, registry=run.registry)
            told = {"ingredients": models, "held_out": alone, "chosen": chosen, "settings": merger.settings()}
            files.write_json(folder / FILE, told)
        run.accelerator.wait_for_everyone()
        return StageResult(encoder=run.open_encoder(str(folder / "merged")))
