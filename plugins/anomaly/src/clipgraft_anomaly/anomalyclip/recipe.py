"""AnomalyCLIP's recipe (Zhou et al., AnomalyCLIP: Object-agnostic Prompt Learning for Zero-shot Anomaly Detection,

ICLR 2024, arXiv 2310.18961): one stage, ``prompts``.
"""

from __future__ import annotations

from clipgraft.errors import ClipgraftError
from clipgraft.recipe import StagePlan
from clipgraft.runner import Run
from clipgraft_anomaly.anomalyclip.config import AnomalyClipRunConfig
from clipgraft_anomaly.anomalyclip.prompts import AnomalyClip
from clipgraft_anomaly.anomalyclip.stage import PromptStage, produce
from clipgraft_anomaly.current_head import switch_on
from clipgraft_anomaly.detector import Fits
from clipgraft_anomaly.feature_store import kept_features
from clipgraft_anomaly.inspection import check_labels
from clipgraft_anomaly.reading import Reader
from clipgraft_anomaly.same_data import DataRecord


class AnomalyClipRecipe:
    """One stage, ``prompts``."""

    def __init__(self, config: AnomalyClipRunConfig) -> None:
        self.config = config

    def plan(self) -> list[StagePlan]:
        """The stage."""
        return [StagePlan("prompts", self._prompts)]

    def check(self, run: Run) -> list[str]:
        """A tower, prompts and data that fit each other, seen before any work."""
        switch_on(run)
        problems = []
        for attempt in (
            lambda: self.config.read.resolved(run.encoder),
            lambda: self.config.prompt.resolved(run.encoder),
            lambda: check_labels(run.train_source()),
        ):
            try:
                attempt()
            except (ClipgraftError, ValueError) as error:
                problems.append(str(error))
        return problems

    def _prompts(self, run: Run) -> PromptStage:
        c, encoder = self.config, run.encoder.requires_grad_(False).eval()
        read, prompt, source = c.read.resolved(encoder), c.prompt.resolved(encoder), run.train_source()
        reader = Reader(encoder, read)
        features = produce(reader)
        store = kept_features(run, source, reader, features, c.cache, stage="prompts")
        trained = DataRecord.of(c.data.from_, source, log=run.log)
        head = AnomalyClip(prompt=prompt, read=read, fits=Fits.of(encoder), trained=trained).to(run.device)
        return PromptStage(
            "prompts", train=c.train, store=store, encoder=encoder, head=head, grid=reader.grid, local=c.loss.local
        )
