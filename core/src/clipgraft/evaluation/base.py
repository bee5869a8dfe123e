"""What an evaluator is, and the features that several evaluators share in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from clipgraft.evaluation.statistics import Share, Statistic, standard_error

if TYPE_CHECKING:
    from torch import Tensor

    from clipgraft.data.base import Pair, PairSource, Sample, Source
    from clipgraft.encoders.base import Encoder


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Metrics in [0, 1] unless their name says otherwise; ``counts`` {metric: (correct, total)} where it is a count.

    ``samples``: one record per sample with plain JSON values and a unique ``id``, in source order. ``statistics``: how
    a metric follows from them, which gives its ``intervals`` (95 %, filled in by ``evaluate``) and paired tests.
    ``lower``: metrics of which less is better, from the evaluator's class attribute ``lower_is_better``, a frozenset.
    """

    metrics: dict[str, float]
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)
    samples: tuple[Mapping[str, Any], ...] = ()
    statistics: Mapping[str, Statistic] = field(default_factory=dict)
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    lower: frozenset[str] = frozenset()

    @property
    def standard_errors(self) -> dict[str, float]:
        """Binomial, of each share p that is a count: sqrt(p (1 - p) / n)."""
        return {name: standard_error(*count) for name, count in self.counts.items()}

    def summary(self) -> dict[str, Any]:
        """Everything but the samples, as plain JSON types."""
        return {
            "metrics": dict(self.metrics),
            "counts": {k: list(v) for k, v in self.counts.items()},
            "standard_errors": self.standard_errors,
            "intervals": {k: list(v) for k, v in self.intervals.items()},
            "shares": {k: v.as_dict() for k, v in self.statistics.items() if isinstance(v, Share)},
            "lower": sorted(self.lower),
        }


class Features(Protocol):
    """Embeddings of one encoder, computed once per (encoder, data) and shared by the evaluators of one call."""

    encoder: Encoder

    def samples(self, source: Source) -> list[Sample]:
        """What is known about each row of ``images(source)``; the pictures are gone."""

    def pairs(self, source: PairSource) -> list[Pair]:
        """What is known about each row of ``pair_images(source)``."""

    def labels(self, source: Source) -> Tensor:
        """(n,) class indices; ``InputError`` unless every row has one of the source's two classes or more."""

    def skipped(self, source: Source | PairSource) -> int:
        """How many samples could not be read, if ``source`` was read."""

    def images(self, source: Source) -> Tensor:
        """(n, D) fp32 of length one, in source order, on the CPU."""

    def tokens(self, source: Source) -> Tensor:
        """(n, N, W) fp32 patch tokens, in source order, on the CPU."""

    def pair_images(self, source: PairSource) -> tuple[Tensor, Tensor]:
        """Two (n, D) fp32 of length one: first and second image of every pair."""

    def texts(self, texts: Sequence[str]) -> Tensor:
        """(n, D) fp32 of length one; prompts are trimmed to the longest of a batch where that is exact."""

    def classifier(self, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
        """(K, D) of length one: mean of the unit embeddings of every template per class, normalised again."""


class Evaluator(Protocol):
    """Measures an encoder on a source. Registered targets are called with their config fields and return one."""

    def __call__(self, features: Features, source: Source | PairSource) -> Evaluation: ...
