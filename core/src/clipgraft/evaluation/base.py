"""What an evaluator is, and the features that several evaluators share in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from clipgraft.data.base import PairSource, Source
    from clipgraft.encoders.base import Encoder


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Metrics in [0, 1] unless their name says otherwise; ``counts`` {metric: (correct, total)} where it is a count;

    ``samples``: one record per sample with plain JSON values, in source order, for paired tests between two models.
    """

    metrics: dict[str, float]
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)
    samples: tuple[Mapping[str, Any], ...] = ()


class Features(Protocol):
    """Embeddings of one encoder, computed once per (encoder, data) and shared by the evaluators of one call."""

    encoder: Encoder

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
