"""Nearest neighbours equal brute force and scikit-learn, halve as the probe does, and count ties as wrong."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from clipgraft.data import open_source
from clipgraft.errors import InputError
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.evaluation.probe import Probe
from clipgraft.evaluation.statistics import intervals, value
from clipgraft.testing.given import Given, noise
from clipgraft.testing.tiny import tiny_clip
from clipgraft_evaluation import knn
from clipgraft_evaluation.knn import Knn, even_half, neighbours


def clouds(n: int = 120, classes: int = 5, seed: int = 0, spread: float = 0.6, prefix: str = "s") -> Given:
    rng, centres = torch.Generator().manual_seed(seed), torch.randn(classes, 8, generator=torch.Generator())
    labels = torch.randint(classes, (n,), generator=rng)
    return Given(centres[labels] + spread * torch.randn(n, 8, generator=rng), labels.tolist(), prefix=prefix)


def folder(root: Path, n: int, *, seed: int = 0) -> str:
    for i in range(n):
        path = root / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(seed + i).permute(1, 2, 0).numpy()).save(path)
    return f"folder:{root}"


def one_line(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_votes_equal_brute_force() -> None:
    source: Any = clouds()
    found = Knn(k=(1, 4, 9))(source, source)
    even = even_half(source.rows)
    pool = [(x.double(), row.label) for x, row, fit in zip(source.x, source.rows, even, strict=True) if fit]
    tested = [(row, x.double()) for x, row, fit in zip(source.x, source.rows, even, strict=True) if not fit]
    assert [row["id"] for row in found.samples] == [row.id for row, _ in tested]
    for (row, x), record in zip(tested, found.samples, strict=True):
        near = sorted(((float(x @ y), label) for y, label in pool), reverse=True)
        for k in (1, 4, 9):
            for vote in ("majority", "weighted"):
                votes = Counter[int]()
                for similarity, label in near[:k]:
                    votes[label] += math.exp(similarity / 0.07) if vote == "weighted" else 1
                rest = max((v for label, v in votes.items() if label != row.label), default=0)
                assert record[f"{vote}_k{k}"] == (votes[row.label] > rest)
    assert 0.5 < found.metrics["top1_weighted_k9"] < 1, "a world in which neighbours tell something, but not all"


def test_one_neighbour_is_scikit_learns() -> None:
    sklearn = pytest.importorskip("sklearn.neighbors")
    source: Any = clouds(300, seed=3)
    even, labels = even_half(source.rows), source.labels(source)
    fitted = sklearn.KNeighborsClassifier(1, metric="cosine").fit(source.x[even], labels[even])
    expected = fitted.predict(source.x[~even]) == labels[~even].numpy()
    found = Knn(k=(1,), votes=("majority",))(source, source)
    assert [row["majority_k1"] for row in found.samples] == expected.tolist()


def test_statistics_are_the_metrics() -> None:
    source: Any = clouds()
    found = Knn(k=(1, 10))(source, source)
    assert set(found.statistics) == set(found.metrics) and len(found.metrics) == 8
    for name, statistic in found.statistics.items():
        assert value(statistic, found.samples) == pytest.approx(found.metrics[name], abs=1e-9)
    low, high = intervals(found.statistics, found.samples)["mean_per_class_weighted_k10"]
    assert low < found.metrics["mean_per_class_weighted_k10"] < high


def test_ties_are_wrong_whatever_the_order_of_rows() -> None:
    x, labels = F.normalize(torch.tensor([[1.0, 0], [1, 0], [0, 1]]), dim=-1), torch.tensor([0, 1, 1])
    query = F.normalize(torch.tensor([[1.0, 0.1]]), dim=-1)
    for order in ([0, 1, 2], [1, 0, 2], [2, 1, 0]):
        for own in (0, 1):
            _, classes = neighbours(query, x[order], labels[order], k=2, avoid=torch.tensor([own]))
            assert classes.tolist() == [[1 - own, own]], "of two equal neighbours the wrong one comes first"
    # two of each class at the same distance: a majority of four is a tie
    source: Any = Given(torch.eye(2)[[0] * 40], [i % 2 for i in range(40)])
    found = Knn(k=(1, 4))(source, source)
    assert set(found.metrics.values()) == {0.0}


def test_nan_is_wrong() -> None:
    source: Any = clouds()
    source.x[:] = torch.nan
    assert set(Knn(k=(1, 10))(source, source).metrics.values()) == {0.0}


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    source: Any = clouds()
    whole = Knn(k=(1, 7))(source, source)
    monkeypatch.setattr(knn, "QUERIES", 7)
    monkeypatch.setattr(knn, "NEIGHBOURS", 5)
    assert Knn(k=(1, 7))(source, source) == whole


def test_the_halves_are_those_of_the_probe_and_batches_change_nothing(tmp_path: Path) -> None:
    source: Any = open_source(folder(tmp_path, 40))
    encoder = tiny_clip()
    found = [Knn(k=(1, 5))(EncoderFeatures(encoder, batch_size=size), source) for size in (3, 64)]
    assert found[0] == found[1]
    probed = Probe(solver="ridge")(EncoderFeatures(encoder), source)
    assert [row["id"] for row in found[0].samples] == [row["id"] for row in probed.samples]


def test_other_data_can_be_searched(tmp_path: Path) -> None:
    train, test = folder(tmp_path / "train", 10), folder(tmp_path / "test", 6, seed=4)
    features, source = EncoderFeatures(tiny_clip()), open_source(test)
    found = Knn(train=train, k=(1,), votes=("weighted",))(features, source)
    assert len(found.samples) == 6
    # images 4 .. 9 of the training folder are the six that are measured: each finds itself
    assert found.metrics == {"top1_weighted_k1": 1.0, "mean_per_class_weighted_k1": 1.0}


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    source: Any = clouds(40)
    assert "k=99 neighbours among" in one_line(lambda: Knn(k=(1, 99))(source, source))
    ref = folder(tmp_path, 6)
    features, opened = EncoderFeatures(tiny_clip()), open_source(ref)
    assert "is the data that is measured" in one_line(lambda: Knn(train=ref, k=(1,))(features, opened))
    assert "doesn't have the classes of given" in one_line(lambda: Knn(train=ref)(features, source))
    (tmp_path / "one" / "a").mkdir(parents=True)
    (tmp_path / "a" / "0.png").rename(tmp_path / "one" / "a" / "0.png")
    alone = open_source(f"folder:{tmp_path / 'one'}")
    assert "has 1 classes where two or more are needed" in one_line(lambda: Knn()(features, alone))
