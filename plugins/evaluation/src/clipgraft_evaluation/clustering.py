"""Whether clusters of embeddings are the classes: k-means, then NMI, accuracy and ARI.

n samples, b draws of them, C classes, G clusters, E pairs (class, cluster) that occur.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from scipy.optimize import linear_sum_assignment
from scipy.special import gammaln, xlogy
from torch import Tensor

from clipgraft.config.schema import Config
from clipgraft.data.base import Source
from clipgraft.errors import InputError
from clipgraft.evaluation.base import Evaluation
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.evaluation.statistics import Bound, Records, Statistic, value
from clipgraft_evaluation.knn import digest, progress

Score = Literal["nmi", "accuracy", "ari"]


class Clustering(Config):
    """k-means (Lloyd, scikit-learn) on unit embeddings, the best of some starts, against the labels."""

    clusters: int | None = Field(None, gt=1, description="clusters; null takes as many as classes occur")
    starts: int = Field(10, gt=0, description="k-means++ starts; the one with the smallest inertia counts")
    seed: int = Field(0, ge=0, lt=2**31, description="of the first centres")

    def __call__(self, features: EncoderFeatures, source: Source) -> Evaluation:
        """``nmi``, ``accuracy`` under the best one-to-one assignment, ``ari`` (can be negative); id, label, cluster."""
        samples, labels, x = features.samples(source), features.labels(source), features.images(source)
        count = self.clusters or len(labels.unique())
        if count < 2:
            raise InputError(f"{source.name}: every sample has the same class; clustering needs two classes or more")
        if count > len(samples):
            raise InputError(
                f"{count} clusters of {len(samples)} samples of {source.name}; set clusters or add samples"
            )
        order = sorted(range(len(samples)), key=lambda row: digest(samples[row].id))  # no trace of the order of rows
        found = torch.empty(len(samples), dtype=torch.long)
        with progress(features, f"k-means of {source.name}", self.starts) as bar:
            best = np.inf
            for start in range(self.starts):
                inertia, clusters = _k_means(x[order].numpy(), count, seed=self.seed + start)
                if inertia < best:
                    best, found[order] = inertia, clusters
                bar.advance()
        rows = zip(samples, labels.tolist(), found.tolist(), strict=True)
        records = tuple({"id": s.id, "label": label, "cluster": cluster} for s, label, cluster in rows)
        scores: tuple[Score, ...] = ("nmi", "accuracy", "ari")
        statistics: dict[str, Statistic] = {name: Agreement(name) for name in scores}
        metrics = {name: value(statistic, records) for name, statistic in statistics.items()}
        counts = {"accuracy": (round(metrics["accuracy"] * len(records)), len(records))}
        return Evaluation(metrics, counts, records, statistics)


@dataclass(frozen=True, slots=True)
class Agreement:
    """NMI (arithmetic mean), accuracy (Hungarian assignment) or ARI (Hubert and Arabie 1985) of two columns.

    A sample that is drawn twice counts as two samples. For ARI the two form no pair, which would always be joined; for
    NMI each entropy gets back what redrawing takes from it on average (Efron's estimate of the bootstrap's bias).
    """

    score: Score
    label: str = "label"
    cluster: str = "cluster"

    def bind(self, samples: Records) -> Bound:
        """Number the pairs (class, cluster) that occur."""
        rows, classes = _numbers([row[self.label] for row in samples])
        columns, clusters = _numbers([row[self.cluster] for row in samples])
        pairs, pair = (rows * clusters + columns).unique(return_inverse=True)
        row, column = pairs // clusters, pairs % clusters

        def counts(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            table = weights.new_zeros(len(weights), len(pairs)).index_add_(1, pair, weights)
            return table, _sum(table, row, classes), _sum(table, column, clusters)

        if self.score == "nmi":
            lost = [_lost(table) for table in counts(torch.ones(1, len(samples), dtype=torch.float64))]
            return lambda weights: _nmi(counts(weights), weights, lost)
        if self.score == "ari":
            return lambda weights: _ari(counts(weights), counts(weights.square()))
        return lambda weights: _accuracy(*counts(weights), row, column)


def _nmi(sums: tuple[Tensor, ...], weights: Tensor, lost: list[float]) -> Tensor:
    """Table (b, E) with its sums (b, C) and (b, G), draws (b, n) -> (b,). One class and one cluster: 1.

    ``lost`` is given back in proportion to how uneven a draw is: not at all where every sample counts once.
    """
    total = weights.sum(1)
    uneven = weights.square().sum(1) / total - 1
    joint, of_rows, of_columns = (
        torch.special.entr(counts / total[:, None]).sum(1) + uneven * gone / total
        for counts, gone in zip(sums, lost, strict=True)
    )
    mean = (of_rows + of_columns) / 2
    return torch.where(mean > 1e-12, (of_rows + of_columns - joint).clamp(min=0) / mean, 1.0)


def _lost(counts: Tensor) -> float:
    """Counts (1, E) of n samples -> n times the entropy that redrawing them takes away on average [nats].

    Sum over entries of E N log N - k log k, where N is Poisson with mean k; 1/2 each for large k.
    """
    known, times = counts.long().flatten().unique(return_counts=True)
    lost = 0.0
    for k, many in zip(known.tolist(), times.tolist(), strict=True):
        n = np.arange(int(k + 12 * k**0.5 + 12))
        chance = np.exp(n * np.log(k) - k - gammaln(n + 1))
        lost += many * (0.5 if k > 1000 else float(chance @ xlogy(n, n) - xlogy(k, k)))
    return lost


def _accuracy(table: Tensor, rows: Tensor, columns: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Table and sums as in ``_nmi``, place (E,) of each entry -> (b,): what the best assignment has right."""
    best = []
    for counts in table:
        dense = np.zeros((rows.shape[1], columns.shape[1]))
        dense[row, column] = counts
        best.append(dense[linear_sum_assignment(dense, maximize=True)].sum())
    return table.new_tensor(best) / table.sum(1)


def _ari(sums: tuple[Tensor, ...], squares: tuple[Tensor, ...]) -> Tensor:
    """Table and sums of weights and of their squares -> (b,): joined pairs, 0 as by chance, 1 if trivial alike."""
    joined, by_rows, by_columns = (
        (weight.square() - square).sum(1) for weight, square in zip(sums, squares, strict=True)
    )
    chance = by_rows * by_columns / (sums[0].sum(1).square() - squares[0].sum(1))
    room = (by_rows + by_columns) / 2 - chance
    return torch.where(room > 1e-9, (joined - chance) / room, 1.0)


def _k_means(x: np.ndarray, count: int, *, seed: int) -> tuple[float, Tensor]:
    """(n, D) -> inertia and (n,) clusters."""
    from sklearn.cluster import KMeans

    fitted = KMeans(count, n_init=1, random_state=seed).fit(x)
    return float(fitted.inertia_), torch.from_numpy(fitted.labels_.astype(np.int64))


def _sum(table: Tensor, place: Tensor, size: int) -> Tensor:
    """(b, E) -> (b, size): entries of one place added."""
    return table.new_zeros(len(table), size).index_add_(1, place, table)


def _numbers(values: list[object]) -> tuple[Tensor, int]:
    """Values as 0, 1, ... and how many there are."""
    known = {value: k for k, value in enumerate(dict.fromkeys(values))}
    return torch.tensor([known[value] for value in values]), len(known)
