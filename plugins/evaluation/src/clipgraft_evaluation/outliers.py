"""Telling images of known classes from others by zero-shot scores (MCM, Ming et al. 2022, arXiv 2211.13445).

n samples of both sides, b draws of them, G distinct scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from clipgraft.config.schema import Config
from clipgraft.data import open_source
from clipgraft.data.base import Source
from clipgraft.errors import InputError
from clipgraft.evaluation.base import Evaluation
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.evaluation.statistics import Bound, Records, Statistic, value

Metric = Literal["auroc", "aupr_known", "aupr_outlier", "fpr95"]
RECALL = 0.95
"""Share of known images that the threshold of ``fpr95`` has to accept."""


class OutOfDistribution(Config):
    """How well a score over the classes tells the source's images from ``outliers``; it is larger for known ones.

    With cosines c to the class embeddings and the temperature t: ``mcm`` is the largest of softmax(c / t),
    ``max-logit`` the largest c, ``energy`` t log sum exp(c / t).
    """

    lower_is_better: ClassVar[frozenset[str]] = frozenset({"fpr95", "outliers_skipped"})

    outliers: str = Field(description="data whose images belong to no class of the source")
    score: Literal["mcm", "max-logit", "energy"] = Field("mcm", description="what is high for known images")
    temperature: float = Field(1.0, gt=0, description="t; 1 on plain cosines is MCM's")
    templates: tuple[str, ...] = Field((), description="prompts with one {}; empty takes those of the data")

    def __call__(self, features: EncoderFeatures, source: Source) -> Evaluation:
        """``auroc``, ``aupr_known``, ``aupr_outlier``, ``fpr95``, ``known_images`` and ``outlier_images`` (counts).

        ``fpr95``: share of outliers accepted at the highest threshold that accepts 95 % of the known images; equal
        scores are accepted together. Records: id (of outliers after "outlier:"), outlier, score.
        """
        opened = open_source(self.outliers)
        if not isinstance(opened, Source) or not isinstance(source, Source):
            ref = source.name if isinstance(opened, Source) else self.outliers
            raise InputError(f"outliers: {ref} holds minimal pairs; out-of-distribution needs single images")
        if opened.fingerprint == source.fingerprint:
            raise InputError(f"outliers: {self.outliers} is the data of the known classes; give images of other things")
        if len(source.classes) < 2:
            raise InputError(
                f"{source.name} has {len(source.classes)} classes where two or more are needed; use class folders or a "
                "label column"
            )
        weights = features.classifier(source.classes, self.templates or source.templates).double()
        records = [
            {"id": f"{prefix}{sample.id}", "outlier": side is opened, "score": score}
            for prefix, side in (("", source), ("outlier:", opened))
            for sample, score in zip(
                features.samples(side), self._scores(features.images(side), weights).tolist(), strict=True
            )
        ]
        names: tuple[Metric, ...] = ("auroc", "aupr_known", "aupr_outlier", "fpr95")
        statistics: dict[str, Statistic] = {name: Separation(name) for name in names}
        metrics = {name: value(statistic, records) for name, statistic in statistics.items()}
        known, unknown = len(features.samples(source)), len(features.samples(opened))
        metrics |= {"known_images": float(known), "outlier_images": float(unknown)}
        if skipped := features.skipped(opened):
            metrics["outliers_skipped"] = float(skipped)
        counts = {"fpr95": (round(metrics["fpr95"] * unknown), unknown)}
        return Evaluation(metrics, counts, tuple(records), statistics)

    def _scores(self, x: Tensor, weights: Tensor) -> Tensor:
        """Unit (n, D) and (K, D) float64 -> (n,)."""
        found = []
        for images in torch.split(x, 4096):
            cosines = images.double() @ weights.T
            if self.score == "max-logit":
                found.append(cosines.amax(1))
            elif self.score == "energy":
                found.append(self.temperature * (cosines / self.temperature).logsumexp(1))
            else:
                found.append((cosines / self.temperature).softmax(1).amax(1))
        return torch.cat(found)


@dataclass(frozen=True, slots=True)
class Separation:
    """A score of how well a column tells known rows from outliers; rows of equal value stay together.

    AUROC is the chance that a known row is above an outlier, ties counting half. AUPR is average precision, either
    side being what is looked for. Undefined (NaN) where a draw holds one side only.
    """

    metric: Metric
    score: str = "score"
    outlier: str = "outlier"

    def bind(self, samples: Records) -> Bound:
        """Sort by score."""
        scores = torch.tensor([float(row[self.score]) for row in samples], dtype=torch.float64)
        outlier = torch.tensor([bool(row[self.outlier]) for row in samples])
        levels, level = scores.nan_to_num(nan=-torch.inf).unique(return_inverse=True)
        if self.metric != "aupr_outlier":
            level = len(levels) - 1 - level  # known ones are sought from the highest score on
        sought = outlier if self.metric == "aupr_outlier" else ~outlier

        def bound(weights: Tensor) -> Tensor:
            hits, misses = (
                weights.new_zeros(len(weights), len(levels)).index_add_(1, level, weights * side)
                for side in (sought, ~sought)
            )
            all_hits, all_misses = hits.sum(1), misses.sum(1)
            found, wrong = hits.cumsum(1), misses.cumsum(1)
            if self.metric == "auroc":
                value = (misses * (found - hits / 2)).sum(1) / (all_hits * all_misses)
            elif self.metric == "fpr95":
                first = (found < RECALL * all_hits[:, None] * (1 - 1e-12)).sum(1, keepdim=True)
                value = wrong.gather(1, first.clamp(max=len(levels) - 1)).squeeze(1) / all_misses
            else:
                precision = torch.where(hits > 0, found / (found + wrong), 0.0)
                value = (hits * precision).sum(1) / all_hits
            return torch.where((all_hits > 0) & (all_misses > 0), value, torch.nan)

        return bound
