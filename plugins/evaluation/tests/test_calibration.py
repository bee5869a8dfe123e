"""Calibration equals torchmetrics, scikit-learn and sums written out; a fitted temperature is the best one."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clipgraft.errors import InputError
from clipgraft.evaluation import evaluate
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.evaluation.statistics import value
from clipgraft.evaluation.zero_shot import ZeroShot
from clipgraft.testing.given import Given
from clipgraft.testing.tiny import tiny_clip
from clipgraft_evaluation.calibration import Calibration, EqualMass, EqualWidth, fitted_temperature
from clipgraft_evaluation.knn import even_half


class Scaled(Given):
    """With a logit scale and bias, and the axes as classes."""

    encoder = SimpleNamespace(logit_scale=torch.tensor(10.0).log(), logit_bias=torch.tensor(-7.0))

    def classifier(self, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
        return torch.eye(self.x.shape[1])[: len(classes)]


def world(n: int = 200, classes: int = 4, seed: int = 0) -> Any:
    """Cosines that lean towards the label, not always."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=rng)
    x = torch.randn(n, classes, generator=rng) + F.one_hot(labels, classes)
    return Scaled(x, labels.tolist())


def probabilities(source: Any) -> Tensor:
    return (10 * source.x.double()).softmax(1)


def rows(hits: Sequence[int], confidence: Sequence[float]) -> list[dict[str, Any]]:
    return [{"id": str(k), "hit": h, "sure": c} for k, (h, c) in enumerate(zip(hits, confidence, strict=True))]


def test_metrics_equal_torchmetrics_and_scikit_learn() -> None:
    torchmetrics = pytest.importorskip("torchmetrics.functional.classification")
    sklearn = pytest.importorskip("sklearn.metrics")
    source = world()
    found, p, labels = Calibration()(source, source).metrics, probabilities(source), source.labels(source)
    expected = torchmetrics.multiclass_calibration_error(p, labels, num_classes=4, n_bins=15, norm="l1")
    assert found["ece"] == pytest.approx(float(expected), abs=1e-6)
    assert found["nll"] == pytest.approx(sklearn.log_loss(labels, p))
    assert found["brier"] == pytest.approx(float((p - F.one_hot(labels, 4)).square().sum(1).mean()))
    assert found["accuracy"] == pytest.approx(float((p.argmax(1) == labels).double().mean()))
    assert found["mean_confidence"] == pytest.approx(float(p.amax(1).mean()))
    assert 0.02 < found["ece"] < 0.5


def test_equal_width_by_hand() -> None:
    told = rows([1, 0, 1, 1, 0], [0.05, 0.5, 0.5, 1.0, 0.51])
    # ten bins of 0.1: {0.05}, {0.5, 0.5}, {0.51}, {1.0}
    by_hand = (abs(1 - 0.05) + abs(1 - 1.0) + abs(0 - 0.51) + abs(1 - 1.0)) / 5
    assert value(EqualWidth("hit", "sure", 10), told) == pytest.approx(by_hand)
    assert value(EqualWidth("hit", "sure", 1), told) == pytest.approx(abs(3 - 2.56) / 5)
    assert value(EqualWidth("hit", "sure", 10), rows([0], [0.0])) == 0


def test_equal_mass_equals_sorted_chunks() -> None:
    rng = torch.Generator().manual_seed(0)
    sure, hits = torch.rand(60, generator=rng).double(), torch.randint(2, (60,), generator=rng)
    order = sure.argsort()
    gaps = [float((hits[chunk] - sure[chunk]).mean().abs()) for chunk in order.split(4)]
    told = rows(hits.tolist(), sure.tolist())
    assert value(EqualMass("hit", "sure", 15), told) == pytest.approx(sum(gaps) / 15)
    assert value(EqualMass("hit", "sure", 60), told) == pytest.approx(float((hits - sure).abs().mean()))


def test_equal_mass_shares_samples_between_bins_and_knows_no_order() -> None:
    told = rows([1, 0, 1], [0.2, 0.6, 0.9])  # two bins of one and a half samples
    by_hand = (abs(0.8 - 0.6 / 2) + abs(-0.6 / 2 + 0.1)) / 3
    assert value(EqualMass("hit", "sure", 2), told) == pytest.approx(by_hand)
    equal = rows([1, 1, 0, 0, 1, 0], [0.5] * 6)
    assert value(EqualMass("hit", "sure", 3), equal) == pytest.approx(0), "equal confidence can't be told apart"
    # a sample drawn twice is two samples, one that isn't drawn is none
    weights = torch.tensor([[2.0, 0, 1]]).double()
    twice = rows([1, 1, 1], [0.2, 0.2, 0.9])
    for statistic in (EqualMass("hit", "sure", 2), EqualWidth("hit", "sure", 15)):
        assert float(statistic.bind(told)(weights)) == pytest.approx(value(statistic, twice))


def test_a_calibrated_model_has_no_error_and_a_sure_wrong_one_has_all() -> None:
    rng = torch.Generator().manual_seed(0)
    sure = torch.rand(20000, generator=rng)
    hits = (torch.rand(20000, generator=rng) < sure).int().tolist()
    for statistic in (EqualWidth("hit", "sure", 15), EqualMass("hit", "sure", 15)):
        assert value(statistic, rows(hits, sure.tolist())) < 0.02
        assert value(statistic, rows([0] * 9, [1.0] * 9)) == 1


def test_a_fitted_temperature_is_the_best_of_a_grid_and_is_measured_on_the_other_half() -> None:
    source = world(400)
    found = Calibration(fit_temperature=True)(source, source)
    even, labels, logits = even_half(source.rows), source.labels(source), 10 * source.x.double()
    grid = [float(F.cross_entropy(logits[even] / t, labels[even])) for t in torch.logspace(-1, 1.5, 500).tolist()]
    temperature = found.metrics["temperature"]
    assert float(F.cross_entropy(logits[even] / temperature, labels[even])) <= min(grid) + 1e-9
    assert [row["id"] for row in found.samples] == [
        s.id for s, fit in zip(source.rows, even.tolist(), strict=True) if not fit
    ]
    after = F.cross_entropy(logits[~even] / temperature, labels[~even])
    assert found.metrics["nll_scaled"] == pytest.approx(float(after))
    assert found.metrics["ece_scaled"] < found.metrics["ece"], "this world is too sure of itself"


def test_a_temperature_that_was_applied_is_found() -> None:
    rng = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20000, 5, generator=rng).double()
    labels = logits.softmax(1).multinomial(1, generator=rng).squeeze(1)
    assert fitted_temperature(3 * logits, labels) == pytest.approx(3, rel=0.05)


@pytest.mark.parametrize("kind", ["vit", "siglip-timm"])
def test_the_models_own_scale_counts_and_the_bias_cancels(kind: Any) -> None:
    encoder, source = tiny_clip(kind=kind), world(30)
    with torch.no_grad():
        encoder.logit_scale.fill_(3.0)
    features = EncoderFeatures(encoder, batch_size=7)
    weights = features.classifier(source.classes, ())
    logits = torch.tensor(3.0).exp() * features.images(source) @ weights.T
    if encoder.logit_bias is not None:
        logits = logits + encoder.logit_bias.detach()
    found = Calibration()(features, source)
    assert [row["confidence"] for row in found.samples] == pytest.approx(logits.softmax(1).amax(1).tolist(), abs=1e-4)
    zero_shot = ZeroShot()(features, source)
    assert [row["prediction"] for row in found.samples] == [row["prediction"] for row in zero_shot.samples]
    whole = Calibration()(EncoderFeatures(encoder, batch_size=64), source)
    assert whole.metrics == pytest.approx(found.metrics, abs=1e-5)


def test_statistics_are_the_metrics() -> None:
    source = world()
    found = Calibration(fit_temperature=True)(source, source)
    assert set(found.statistics) == set(found.metrics) - {"temperature"}
    for name, statistic in found.statistics.items():
        assert value(statistic, found.samples) == pytest.approx(found.metrics[name], abs=1e-9)


def test_ties_are_wrong() -> None:
    source: Any = Scaled(torch.ones(4, 2), [0, 1, 0, 1])
    found = Calibration()(source, source).metrics
    assert found["accuracy"] == 0 and found["mean_confidence"] == pytest.approx(0.5)


def test_bad_input_is_one_line() -> None:
    source: Any = Scaled(torch.ones(1, 2), [0], classes=2)
    with pytest.raises(InputError, match="too few samples to fit on one half; leave out fit_temperature"):
        Calibration(fit_temperature=True)(source, source)
    one: Any = Scaled(torch.ones(2, 2), [0, 0])
    with pytest.raises(InputError, match="has 1 classes where two or more are needed"):
        Calibration()(EncoderFeatures(tiny_clip()), one)
    with pytest.raises(InputError, match="fit_temperatur"):
        from clipgraft.config.schema import EvaluatorNode

        evaluate(tiny_clip(), [EvaluatorNode(use="evaluation/calibration", data="x", fit_temperatur=True)])
