"""One metric of one evaluator on named data, for many models: data are opened once, words encoded once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clipgraft.config.schema import EvaluatorNode
from clipgraft.data import open_source
from clipgraft.data.base import PairSource, Source
from clipgraft.errors import unknown_name
from clipgraft.log import RunLog

if TYPE_CHECKING:
    from clipgraft.encoders.base import Encoder
    from clipgraft.evaluation.base import Evaluation
    from clipgraft.registry import Registry


class Scores:
    """``metric`` None takes the evaluator's first; ``lower`` says whether less of it is better, once it was measured.

    With a process group all ranks must ask for the same.
    """

    def __init__(
        self,
        on: EvaluatorNode,
        *,
        data: Mapping[str, str],
        registry: Registry,
        metric: str | None = None,
        batch_size: int = 256,
        workers: int | None = 0,
        log: RunLog | None = None,
    ) -> None:
        self.name = registry.get("evaluator", on.use).name
        self._evaluator = registry.build("evaluator", self.name, on.settings)
        self._sources = {name: open_source(reference, registry=registry) for name, reference in data.items()}
        self.metric, self.lower, self._registry = metric, False, registry
        self._batch_size, self._workers, self._log = batch_size, workers, log
        self._words: dict[str, Tensor] = {}

    def source(self, name: str) -> Source | PairSource:
        """The opened data."""
        return self._sources[name]

    def of(self, encoder: Encoder, *, only: Iterable[str] | None = None) -> dict[str, float]:
        """{name of the data: metric}."""
        from clipgraft.evaluation.features import EncoderFeatures
        from clipgraft.registry import use

        names = list(self._sources if only is None else only)
        features = EncoderFeatures(
            encoder.eval(),
            batch_size=self._batch_size,
            classifiers=self._words,
            workers=self._workers,
            log=self._log,
        )
        with use(self._registry), torch.no_grad(), torch.random.fork_rng():
            return {name: self._score(self._evaluator(features, self._sources[name])) for name in names}

    def _score(self, evaluation: Evaluation) -> float:
        metric = self.metric or next(iter(evaluation.metrics))
        if metric not in evaluation.metrics:
            raise unknown_name(f"metric of {self.name}", metric, evaluation.metrics)
        self.metric = metric
        self.lower = metric in evaluation.lower or metric in getattr(self._evaluator, "lower_is_better", ())
        return float(evaluation.metrics[metric])
