"""CLIPN's recipe: one stage, ``no`` (Wang et al., CLIPN for Zero-Shot OOD Detection: Teaching CLIP to Say No,

ICCV 2023, arXiv 2308.12213).
"""

from __future__ import annotations

from clipgraft.data.base import BadSample, Listed, Source
from clipgraft.errors import ClipgraftError
from clipgraft.recipe import StagePlan
from clipgraft.runner import Run
from clipgraft_anomaly.clipn.branch import NoBranch, why_no_branch
from clipgraft_anomaly.clipn.config import ClipnRunConfig
from clipgraft_anomaly.clipn.negation import Filled
from clipgraft_anomaly.clipn.stage import NoStage
from clipgraft_anomaly.current_head import switch_on

LOOKED_AT = 20
"""Samples that are tried until one can be read."""


class ClipnRecipe:
    """One stage, ``no``."""

    def __init__(self, config: ClipnRunConfig) -> None:
        self.config = config

    def plan(self) -> list[StagePlan]:
        """The stage."""
        return [StagePlan("no", self._no)]

    def check(self, run: Run) -> list[str]:
        """A text tower that can be doubled, templates that fit it, and captions, seen before any work."""
        switch_on(run)
        problem = why_no_branch(run.encoder.text)
        problems = [f"model: {problem}"] if problem else []
        try:
            if not problem and self.config.no.written:
                Filled(run.encoder, [t for pair in self.config.no.written for t in pair])
            if not _captioned(source := run.train_source()):
                problems.append(
                    f"data: CLIPN learns from captions, {source.name} has none; give a csv: with a caption column, "
                    "or another data source with captions"
                )
        except ClipgraftError as error:
            problems.append(str(error))
        per_rank = self.config.train.batch_size // (run.accelerator.num_processes * self.config.train.accumulate)
        if self.config.train.batch_size < 2 or (self.config.shuffled and per_rank < 2):
            problems.append("train.batch_size: captions of other pictures are needed; set it to 2 or more")
        return problems

    def _no(self, run: Run) -> NoStage:
        c, encoder = self.config, run.encoder.requires_grad_(False).eval()
        branch = NoBranch.copy_of(encoder, no=c.no, scale=c.scale)
        return NoStage(
            "no",
            train=c.train,
            source=run.train_source(),
            encoder=encoder,
            branch=branch,
            loss=c.loss,
            shuffled=c.shuffled,
        )


def _captioned(source: Source) -> bool:
    """Whether the first sample that can be read has a caption."""
    for index in range(min(len(source), LOOKED_AT)):
        try:
            found = source.entry(index) if isinstance(source, Listed) else source[index]
        except BadSample:
            continue
        return bool(found.captions)
    return True  # the loader says what is wrong with them
