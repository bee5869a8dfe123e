"""Geometry equals loops over pairs and eigenvalues, on draws too."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clipgraft.data.base import Sample
from clipgraft.errors import InputError
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.evaluation.statistics import intervals, value
from clipgraft.testing.tiny import tiny_clip
from clipgraft_evaluation import geometry
from clipgraft_evaluation.geometry import Geometry


class World:
    """Images and texts as numbers; ``texts[i]`` is the caption of image i."""

    name, classes, templates, attributes = "world", (), (), {}

    def __init__(self, x: Tensor, y: Tensor, texts: Sequence[str]) -> None:
        self.x, self.rows = F.normalize(x, dim=-1), [Sample(f"s{i}", x, (t, "other")) for i, t in enumerate(texts)]
        self.known = dict(zip(texts, F.normalize(y, dim=-1), strict=True))
        self.fingerprint = repr(texts)

    def __len__(self) -> int:
        return len(self.rows)

    def samples(self, source: World) -> list[Sample]:
        return source.rows

    def images(self, source: World) -> Tensor:
        return source.x

    def texts(self, texts: Sequence[str]) -> Tensor:
        return torch.stack([self.known[text] for text in texts])


def world(n: int = 40, *, gap: float = 1.0, distinct: int | None = None, seed: int = 0) -> Any:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 8, generator=rng)
    y = x + 0.7 * torch.randn(n, 8, generator=rng)
    y[:, 0] += 3 * gap
    count = distinct or n
    texts = [f"text {i % count}" for i in range(n)]
    return World(x, y[[i % count for i in range(n)]], texts)


def brute_force(x: Tensor, y: Tensor, texts: Sequence[str]) -> dict[str, float]:
    """Rows as they are, drawn ones repeated; ``texts`` say which texts are one."""
    pairs = [(i, j) for i in range(len(x)) for j in range(len(x)) if i != j]

    def uniformity(points: Tensor, names: Sequence[Any]) -> float:
        kernel = [float((-2 * (points[i] - points[j]).square().sum()).exp()) for i, j in pairs if names[i] != names[j]]
        return float(torch.tensor(kernel).double().mean().log())

    def rank(points: Tensor) -> float:
        values = torch.linalg.eigvalsh(torch.cov(points.T, correction=0))
        return float(values.sum().square() / values.square().sum())

    return {
        "modality_gap": float((x.mean(0) - y.mean(0)).norm()),
        "matched_cosine": float((x * y).sum(1).mean()),
        "unmatched_cosine": float(torch.stack([x[i] @ y[j] for i, j in pairs if texts[i] != texts[j]]).mean()),
        "alignment": float((x - y).norm(dim=1).square().mean()),
        "uniformity_images": uniformity(x, [tuple(row.tolist()) for row in x]),
        "uniformity_texts": uniformity(y, texts),
        "effective_rank_images": rank(x),
        "effective_rank_texts": rank(y),
    }


@pytest.mark.parametrize("distinct", [None, 6])
def test_metrics_are_brute_forces_on_draws_too(distinct: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "CHUNK", 150)
    source = world(distinct=distinct)
    found = Geometry()(source, source)
    x, texts = source.x.double(), [row.captions[0] for row in source.rows]
    y = source.texts(texts).double()
    assert {k: v for k, v in found.metrics.items() if k != "separability"} == pytest.approx(brute_force(x, y, texts))
    assert set(found.statistics) == set(found.metrics)
    drawn = torch.randint(len(x), (2, len(x)), generator=torch.Generator().manual_seed(1))
    weights = torch.stack([d.bincount(minlength=len(x)) for d in drawn]).double()
    for k, draw in enumerate(drawn.tolist()):
        for name, expected in brute_force(x[draw], y[draw], [texts[i] for i in draw]).items():
            assert float(found.statistics[name].bind(found.samples)(weights)[k]) == pytest.approx(expected), name


def test_statistics_are_the_metrics_in_any_order_of_records() -> None:
    source = world()
    found = Geometry()(source, source)
    for name, statistic in found.statistics.items():
        assert value(statistic, found.samples) == pytest.approx(found.metrics[name], abs=1e-9)
        assert value(statistic, found.samples[::-1]) == pytest.approx(found.metrics[name], abs=1e-9)
    low, high = intervals(found.statistics, found.samples, draws=200)["modality_gap"]
    assert low < found.metrics["modality_gap"] < high


def test_known_shapes() -> None:
    around = torch.eye(8).repeat(4, 1)
    same: Any = World(around, around, [f"t{i}" for i in range(32)])
    found = Geometry()(same, same).metrics
    assert found["modality_gap"] == pytest.approx(0) and found["alignment"] == pytest.approx(0)
    assert found["matched_cosine"] == pytest.approx(1)
    assert found["effective_rank_images"] == pytest.approx(7), "eight corners span seven dimensions evenly"
    assert found["separability"] == pytest.approx(0.5)
    point: Any = World(torch.ones(20, 3), torch.randn(20, 3), [f"t{i}" for i in range(20)])
    found = Geometry()(point, point).metrics
    assert found["uniformity_images"] == pytest.approx(0) and math.isnan(found["effective_rank_images"]), "one point"
    apart, closed = world(gap=3), world(gap=0)
    found = Geometry()(apart, apart).metrics
    assert found["modality_gap"] > 2 * Geometry()(closed, closed).metrics["modality_gap"]
    assert found["separability"] == 1


def test_settings_count() -> None:
    source = world()
    x, y = source.x.double(), source.texts([row.captions[0] for row in source.rows]).double()
    found = Geometry(alpha=1, t=0.5)(source, source).metrics
    assert found["alignment"] == pytest.approx(float((x - y).norm(dim=1).mean()))
    spread = torch.pdist(x).square().mul(-0.5).exp().mean().log()
    assert found["uniformity_images"] == pytest.approx(float(spread))


def test_a_limit_draws_by_id_whatever_the_order() -> None:
    source = world(60)
    found = Geometry(limit=15)(source, source)
    assert len(found.samples) == 15
    kept = {row["id"] for row in found.samples}
    assert kept != {f"s{i}" for i in range(15)}
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0)).tolist()
    source.x, source.rows = source.x[order], [source.rows[k] for k in order]
    again = Geometry(limit=15)(source, source)
    assert {row["id"] for row in again.samples} == kept
    assert again.metrics == pytest.approx(found.metrics)


class Labelled:
    """Real images with labels and no captions."""

    name, attributes, fingerprint = "labelled", {}, "labelled"

    def __init__(self, classes: Sequence[str], templates: Sequence[str]) -> None:
        self.classes, self.templates = classes, templates

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Sample:
        rng = torch.Generator().manual_seed(index)
        image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=rng)
        return Sample(f"s{index}", image, label=index % len(self.classes))


def test_classes_stand_in_for_captions_and_batches_change_nothing() -> None:
    source: Any = Labelled(("red", "blue"), ("a photo of a {}", "the {}"))
    asked: list[str] = []

    class Asking(EncoderFeatures):
        def texts(self, texts: Sequence[str]) -> Tensor:
            asked.extend(texts)
            return super().texts(texts)

    found = Geometry()(Asking(tiny_clip(), batch_size=5), source)
    assert set(asked) == {"a photo of a red", "a photo of a blue", "the red", "the blue"}
    whole = Geometry()(EncoderFeatures(tiny_clip(), batch_size=64), source)
    assert whole.metrics == pytest.approx(found.metrics, abs=1e-5)


def one_line(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_input_is_one_line() -> None:
    features = EncoderFeatures(tiny_clip())
    one: Any = Labelled(("red",), ("a {}",))
    assert "labelled: 1 text for 24 images" in one_line(lambda: Geometry()(features, one))
    source = world()
    source.rows = [Sample("bare", torch.zeros(1)), *source.rows[1:]]
    assert "bare has neither caption nor class" in one_line(lambda: Geometry()(source, source))
