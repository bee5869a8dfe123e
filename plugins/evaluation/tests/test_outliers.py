"""Out-of-distribution scores by hand, and what they separate by scikit-learn and torchmetrics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from clipgraft.config.schema import EvaluatorNode
from clipgraft.data import open_source
from clipgraft.errors import InputError
from clipgraft.evaluation import evaluate
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.evaluation.statistics import intervals, value
from clipgraft.testing.tiny import tiny_clip
from clipgraft_evaluation.outliers import OutOfDistribution, Separation

METRICS: Any = ("auroc", "aupr_known", "aupr_outlier", "fpr95")


def folder(root: Path, names: str, n: int, *, seed: int) -> str:
    for i in range(n):
        path = root / names[i % len(names)] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = torch.Generator().manual_seed(seed + i)
        Image.fromarray(torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=rng).numpy()).save(path)
    return f"folder:{root}"


def told(n: int, *, levels: int = 10**6, seed: int = 0) -> list[dict[str, Any]]:
    """Known rows lie higher; few levels make many ties."""
    rng = torch.Generator().manual_seed(seed)
    outlier = torch.rand(n, generator=rng) < 0.4
    scores = ((torch.randn(n, generator=rng) - outlier.float()) * levels / 8).round() / levels
    rows = zip(outlier.tolist(), scores.tolist(), strict=True)
    return [{"id": str(k), "outlier": o, "score": s} for k, (o, s) in enumerate(rows)]


def reference(metric: str, rows: list[dict[str, Any]]) -> float:
    from sklearn import metrics

    known, scores = [not row["outlier"] for row in rows], [row["score"] for row in rows]
    if metric == "auroc":
        return float(metrics.roc_auc_score(known, scores))
    if metric == "aupr_known":
        return float(metrics.average_precision_score(known, scores))
    if metric == "aupr_outlier":
        return float(metrics.average_precision_score([not k for k in known], [-s for s in scores]))
    accepted, passed, _ = metrics.roc_curve(known, scores, drop_intermediate=False)
    return float(accepted[(passed >= 0.95).argmax()])


def one_line(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("levels", [10**6, 12])
def test_separation_is_scikit_learns_on_draws_too(metric: Any, levels: int) -> None:
    rows = told(150, levels=levels)
    assert value(Separation(metric), rows) == pytest.approx(reference(metric, rows), abs=1e-9)
    drawn = torch.randint(150, (4, 150), generator=torch.Generator().manual_seed(1))
    weights = torch.stack([d.bincount(minlength=150) for d in drawn]).double()
    expected = [reference(metric, [rows[k] for k in d]) for d in drawn.tolist()]
    assert Separation(metric).bind(rows)(weights).tolist() == pytest.approx(expected, abs=1e-9)


def test_auroc_and_average_precision_are_torchmetrics() -> None:
    found = pytest.importorskip("torchmetrics.functional.classification")
    rows = told(200, seed=2)
    scores, known = torch.tensor([r["score"] for r in rows]).sigmoid(), torch.tensor([not r["outlier"] for r in rows])
    auroc = float(found.binary_auroc(scores, known.long()))
    assert value(Separation("auroc"), rows) == pytest.approx(auroc, abs=1e-5)
    aupr = float(found.binary_average_precision(scores, known.long()))
    assert value(Separation("aupr_known"), rows) == pytest.approx(aupr, abs=1e-5)


def test_perfect_reversed_equal_and_one_sided() -> None:
    def rows(known: list[float], outliers: list[float]) -> list[dict[str, Any]]:
        sides = [(False, s) for s in known] + [(True, s) for s in outliers]
        return [{"id": str(k), "outlier": o, "score": s} for k, (o, s) in enumerate(sides)]

    def scores(told: list[dict[str, Any]]) -> dict[str, float]:
        return {name: value(Separation(name), told) for name in METRICS}

    assert scores(rows([3, 4], [1, 2])) == {"auroc": 1, "aupr_known": 1, "aupr_outlier": 1, "fpr95": 0}
    assert scores(rows([1, 2], [3, 4]))["auroc"] == 0 and scores(rows([1, 2], [3, 4]))["fpr95"] == 1
    assert scores(rows([1, 1], [1, 1])) == {"auroc": 0.5, "aupr_known": 0.5, "aupr_outlier": 0.5, "fpr95": 1}
    assert all(torch.tensor(list(scores(rows([1, 2], [])).values())).isnan())


@pytest.mark.parametrize("score", ["mcm", "max-logit", "energy"])
def test_scores_by_hand(tmp_path: Path, score: Any) -> None:
    source: Any = open_source(folder(tmp_path / "known", "ab", 12, seed=0))
    ref = folder(tmp_path / "other", "z", 5, seed=50)
    features = EncoderFeatures(tiny_clip(), batch_size=5)
    found = OutOfDistribution(outliers=ref, score=score, temperature=0.5)(features, source)

    def by_hand(images: Tensor) -> list[float]:
        cosines = (images @ features.classifier(["a", "b"], ()).T).double()
        if score == "max-logit":
            return cosines.max(1).values.tolist()
        if score == "energy":
            return (0.5 * (cosines / 0.5).exp().sum(1).log()).tolist()
        powers = (cosines / 0.5).exp()
        return (powers.max(1).values / powers.sum(1)).tolist()

    opened: Any = open_source(ref)
    expected = by_hand(features.images(source)) + by_hand(features.images(opened))
    assert [row["score"] for row in found.samples] == pytest.approx(expected, abs=1e-6)
    assert [row["outlier"] for row in found.samples] == [False] * 12 + [True] * 5
    assert found.samples[0]["id"] == "a/0.png" and found.samples[12]["id"] == "outlier:z/0.png"
    assert found.metrics["known_images"] == 12 and found.metrics["outlier_images"] == 5
    assert found.counts["fpr95"] == (round(5 * found.metrics["fpr95"]), 5)
    for name in METRICS:
        assert value(found.statistics[name], found.samples) == pytest.approx(found.metrics[name], abs=1e-9)
    low, high = intervals(found.statistics, found.samples, draws=200)["auroc"]
    assert low <= found.metrics["auroc"] <= high
    whole = OutOfDistribution(outliers=ref, score=score, temperature=0.5)(
        EncoderFeatures(tiny_clip(), batch_size=64), source
    )
    assert whole.metrics == pytest.approx(found.metrics, abs=1e-6)


def test_ids_that_both_sides_have_stay_apart_and_unreadable_outliers_are_counted(tmp_path: Path) -> None:
    source: Any = open_source(folder(tmp_path / "known", "ab", 6, seed=0))
    ref = folder(tmp_path / "other", "ab", 6, seed=50)
    (tmp_path / "other" / "a" / "0.png").write_bytes(b"no image")
    found = OutOfDistribution(outliers=ref)(EncoderFeatures(tiny_clip()), source)
    assert len({row["id"] for row in found.samples}) == 11
    assert found.metrics["outliers_skipped"] == 1 and found.metrics["outlier_images"] == 5


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    ref, single = folder(tmp_path / "known", "ab", 4, seed=0), folder(tmp_path / "one", "a", 4, seed=9)
    features, source = EncoderFeatures(tiny_clip()), open_source(ref)
    assert "is the data of the known classes" in one_line(lambda: OutOfDistribution(outliers=ref)(features, source))
    alone = open_source(single)
    assert "has 1 classes where two or more" in one_line(lambda: OutOfDistribution(outliers=ref)(features, alone))
    assert "no such folder" in one_line(lambda: OutOfDistribution(outliers="folder:nowhere")(features, source))
    node = EvaluatorNode(use="evaluation/out-of-distribution", data=ref)
    assert "outliers is not set" in one_line(lambda: evaluate(tiny_clip(), [node]))
