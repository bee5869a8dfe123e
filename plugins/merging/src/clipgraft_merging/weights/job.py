"""A merge as a stage of a recipe: its result is the run's encoder from then on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from clipgraft.recipe import StagePlan
from clipgraft.stage import JobStage, StageResult
from clipgraft_merging.weights.engine import Merger, merge_to, open_inputs

if TYPE_CHECKING:
    from clipgraft.runner import Run

Choose = Callable[["Run"], Merger]


def merge_stage(
    name: str, merger: Merger | Choose, *, models: Callable[[Run], Sequence[str]], base: Callable[[Run], str] | None
) -> StagePlan:
    """Merge what ``models(run)`` names; ``base(run)`` is the model that they were fine-tuned from.

    ``merger`` is a method, or a function that makes one when the stage's turn comes. The merged folder stays in the
    stage's folder as ``merged``.
    """

    def job(run: Run) -> StageResult:
        found = merger if hasattr(merger, "merge") else merger(run)  # type: ignore[operator]
        folder = run.stage_folder(name) / "merged"
        if run.is_main:
            opened = open_inputs(models(run), base=None if base is None else base(run), registry=run.registry)
            merge_to(folder, opened, found, log=run.log, registry=run.registry)
        run.accelerator.wait_for_everyone()
        return StageResult(encoder=run.open_encoder(str(folder)))

    return StagePlan(name, lambda run: JobStage(name, job))
