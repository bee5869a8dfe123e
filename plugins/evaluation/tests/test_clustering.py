"""Clusters: scores equal scikit-learn's, on the records and on draws of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import pytest
import torch

from clipgraft.errors import InputError
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.evaluation.statistics import intervals, value
from clipgraft.testing.given import Given
from clipgraft.testing.tiny import tiny_clip
from clipgraft_evaluation.clustering import Agreement, Clustering

SCORES: Any = ("nmi", "accuracy", "ari")


def columns(n: int, classes: int, clusters: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=rng)
    noise = torch.randint(clusters, (n,), generator=rng)
    found = torch.where(torch.rand(n, generator=rng) < 0.5, labels % clusters, noise)
    rows = zip(labels.tolist(), found.tolist(), strict=True)
    return [{"id": str(k), "label": label, "cluster": cluster} for k, (label, cluster) in enumerate(rows)]


def reference(score: str, rows: Sequence[dict[str, Any]]) -> float:
    """scikit-learn, and every assignment tried."""
    from sklearn import metrics

    labels, clusters = [row["label"] for row in rows], [row["cluster"] for row in rows]
    if score == "nmi":
        return float(metrics.normalized_mutual_info_score(labels, clusters))
    if score == "ari":
        return float(metrics.adjusted_rand_score(labels, clusters))
    names = sorted({*labels, *clusters})
    hits = [sum(p[names.index(c)] == y for y, c in zip(labels, clusters, strict=True)) for p in permutations(names)]
    return max(hits) / len(rows)


def ari(rows: Sequence[dict[str, Any]], drawn: Sequence[int]) -> float:
    """Over pairs of draws, those of one sample left out."""
    pairs = [(rows[i], rows[j]) for a, i in enumerate(drawn) for j in drawn[:a] if i != j]
    labels, clusters = ([a[key] == b[key] for a, b in pairs] for key in ("label", "cluster"))
    joined = sum(a and b for a, b in zip(labels, clusters, strict=True))
    chance = sum(labels) * sum(clusters) / len(pairs)
    room = (sum(labels) + sum(clusters)) / 2 - chance
    return (joined - chance) / room if room else 1.0


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("shape", [(60, 4, 4), (60, 5, 3), (60, 3, 5), (5, 2, 2)])
def test_scores_are_scikit_learns_on_draws_too(score: Any, shape: tuple[int, int, int]) -> None:
    rows = columns(*shape)
    assert value(Agreement(score), rows) == pytest.approx(reference(score, rows), abs=1e-9)
    drawn = torch.randint(len(rows), (3, len(rows)), generator=torch.Generator().manual_seed(1))
    weights = torch.stack([d.bincount(minlength=len(rows)) for d in drawn]).double()
    if score == "nmi":
        return  # its draws are centred, see below
    expected = [reference(score, [rows[k] for k in d]) if score != "ari" else ari(rows, d) for d in drawn.tolist()]
    assert Agreement(score).bind(rows)(weights).tolist() == pytest.approx(expected, abs=1e-9)
    once = list(range(len(rows)))
    assert ari(rows, once) == pytest.approx(reference("ari", rows), abs=1e-9)


@pytest.mark.parametrize("score", ["nmi", "ari"])
@pytest.mark.parametrize("classes", [5, 40])
def test_redrawing_is_no_gain(score: Any, classes: int) -> None:
    """Repeated samples agree with themselves; draws lie around the metric all the same, as wide as without repair."""
    rows = columns(300, classes, classes)
    drawn = torch.randint(300, (1500, 300), generator=torch.Generator().manual_seed(1))
    weights = torch.stack([d.bincount(minlength=300) for d in drawn]).double()
    found, metric = Agreement(score).bind(rows)(weights), value(Agreement(score), rows)
    naive = [reference(score, [rows[k] for k in d]) for d in drawn[:200].tolist()]
    off, spread = float(found.mean()) - metric, float(found.std())
    assert abs(off) < 0.3 * spread
    assert spread == pytest.approx(float(torch.tensor(naive).std()), rel=0.35)
    if classes == 40:
        assert sum(naive) / 200 - metric > 2 * abs(off), "what is repaired"


@pytest.mark.parametrize("score", SCORES)
def test_renamed_clusters_are_the_same_clusters(score: Any) -> None:
    rows = [{"id": str(k), "label": k % 3, "cluster": (k + 1) % 3} for k in range(9)]
    assert value(Agreement(score), rows) == pytest.approx(1)
    alike = [{"id": str(k), "label": 0, "cluster": 5} for k in range(4)]
    assert value(Agreement(score), alike) == 1, "one class, one cluster"


def test_clusters_that_are_the_classes_are_found_and_others_are_not() -> None:
    labels = [k % 3 for k in range(60)]
    rng = torch.Generator().manual_seed(0)
    apart: Any = Given(torch.eye(3)[labels] + 0.05 * torch.randn(60, 3, generator=rng), labels)
    found = Clustering()(apart, apart)
    assert found.metrics == pytest.approx({"nmi": 1, "accuracy": 1, "ari": 1})
    assert found.counts == {"accuracy": (60, 60)}
    noise: Any = Given(torch.randn(60, 3, generator=rng), labels)
    assert Clustering()(noise, noise).metrics["ari"] < 0.2


def test_k_means_is_scikit_learns() -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    labels = [k % 3 for k in range(90)]
    source: Any = Given(torch.randn(90, 6, generator=torch.Generator().manual_seed(0)), labels)
    found = [row["cluster"] for row in Clustering(clusters=5, starts=10)(source, source).samples]

    def inertia(clusters: Sequence[int]) -> float:
        x, own = source.x, torch.tensor(clusters)
        return sum(float((x[own == c] - x[own == c].mean(0)).square().sum()) for c in own.unique())

    theirs = cluster.KMeans(5, n_init=10, random_state=0).fit(source.x.numpy())
    assert inertia(found) <= theirs.inertia_ * 1.05
    assert inertia(theirs.labels_.tolist()) == pytest.approx(theirs.inertia_, rel=1e-4)


def test_classes_that_do_not_occur_are_not_looked_for() -> None:
    source: Any = Given(torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), [0, 1] * 10, classes=7)
    assert {row["cluster"] for row in Clustering()(source, source).samples} == {0, 1}


def test_statistics_are_the_metrics_and_batches_and_rows_change_nothing() -> None:
    labels = [k % 4 for k in range(48)]
    source: Any = Given(torch.zeros(48, 1), labels)
    encoder = tiny_clip()
    first, second = (Clustering(starts=3)(EncoderFeatures(encoder, batch_size=size), source) for size in (5, 64))
    assert first == second
    for name, statistic in first.statistics.items():
        assert value(statistic, first.samples) == pytest.approx(first.metrics[name], abs=1e-9)
    low, high = intervals(first.statistics, first.samples, draws=200)["nmi"]
    assert low < high
    mixed: Any = Given(torch.zeros(48, 1), labels)
    mixed.rows = [source.rows[k] for k in torch.randperm(48, generator=torch.Generator().manual_seed(0)).tolist()]
    mixed.fingerprint = "mixed"
    assert Clustering(starts=3)(EncoderFeatures(encoder), mixed).metrics == pytest.approx(first.metrics)


def test_bad_input_is_one_line() -> None:
    same: Any = Given(torch.randn(4, 3), [1, 1, 1, 1])
    with pytest.raises(InputError, match="every sample has the same class"):
        Clustering()(same, same)
    few: Any = Given(torch.randn(4, 3), [0, 1, 0, 1])
    with pytest.raises(InputError, match="9 clusters of 4 samples of given; set clusters"):
        Clustering(clusters=9)(few, few)
