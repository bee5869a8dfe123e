"""The recipe ``merging/wise-ft``: fine-tune, then go back some of the way.

Wortsman et al., Robust fine-tuning of zero-shot models, CVPR 2022, arXiv 2109.01903.
"""

from __future__ import annotations

from clipgraft import files
from clipgraft.errors import InputError
from clipgraft.recipe import StagePlan
from clipgraft.runner import Run
from clipgraft.stage import JobStage, StageResult
from clipgraft_merging.recipes_merge.config import WiseFtRunConfig
from clipgraft_merging.recipes_merge.left_behind import FILE
from clipgraft_merging.recipes_merge.tuning import fine_tune

TUNE, LINE = "fine-tune", "interpolate"


class WiseFtRecipe:
    """``fine-tune``, then ``interpolate``."""

    def __init__(self, config: WiseFtRunConfig) -> None:
        self.config = config

    def plan(self) -> list[StagePlan]:
        """Two stages; the second alone for a model that is tuned already."""
        c = self.config
        line = StagePlan(LINE, lambda run: JobStage(LINE, self._interpolate))
        if c.tuned is not None:
            return [line]
        return [
            StagePlan(
                TUNE, lambda run: fine_tune(run, TUNE, tuning=c.tuning, train=c.train, source=run.train_source())
            ),
            line,
        ]

    def check(self, run: Run) -> list[str]:
        """Data that open, and a tuned model that is one of the base."""
        problems = []
        c = self.config
        if c.tuned is not None:
            from clipgraft_merging.weights.engine import open_inputs

            try:
                open_inputs([c.tuned], base=c.model.from_, registry=run.registry)
            except InputError as error:
                problems.append(f"tuned: {error}")
        trained_on = c.data.from_ if c.tuned is None else None
        for reference in dict.fromkeys((trained_on, c.judge.data, c.shifted, c.same)):
            try:
                if reference is not None:
                    run.open_source(reference)
            except InputError as error:
                problems.append(str(error))
        return problems

    def _interpolate(self, run: Run) -> StageResult:
        from clipgraft_merging.path.measuring import PathMeter, measure_path
        from clipgraft_merging.path.report import PathReport, write_report
        from clipgraft_merging.weights.engine import merge_to, open_inputs
        from clipgraft_merging.wise_ft.interpolation import WiseFt

        c, folder = self.config, run.stage_folder(LINE)
        tuned = c.tuned or str(run.stage_folder(TUNE) / "result" / "encoder")
        inputs = open_inputs([tuned], base=c.model.from_, registry=run.registry)
        data = {"held out": c.judge.data, "same": c.same, "shifted": c.shifted}
        named = {name: reference for name, reference in data.items() if reference is not None}
        alpha = c.alpha
        if named:
            meter = PathMeter(
                inputs.described,
                c.judge.on,
                data=named,
                registry=run.registry,
                metric=c.judge.metric,
                batch_size=c.evaluate.batch_size,
            )
            points = measure_path(inputs, meter, alphas=sorted({0.0, *c.alphas, 1.0}), log=run.log)
            report = PathReport(c.model.from_, tuned, meter.scored.metric or "", meter.scored.lower, points)
            alpha = report.best("held out") if alpha is None else alpha
            report = PathReport(
                c.model.from_, tuned, meter.scored.metric or "", meter.scored.lower, points, chosen=alpha
            )
            if run.is_main:
                write_report(report, folder)
        assert alpha is not None  # the config asks for held-out data or a number
        run.log.info(f"alpha {alpha:g}{' of the path' if c.alpha is None else ''}")
        if run.is_main:
            merge_to(folder / "merged", inputs, WiseFt(alpha=alpha), log=run.log, registry=run.registry)
            files.write_json(folder / FILE, {"alpha": alpha})
        run.accelerator.wait_for_everyone()
        return StageResult(encoder=run.open_encoder(str(folder / "merged")), metrics={"alpha": alpha})
