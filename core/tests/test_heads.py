"""Heads: cosines to class embeddings, and linear probes equal to scikit-learn's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clipgraft.errors import InputError
from clipgraft.heads.linear_probe import DECAYS, LinearProbe, LinearProbeConfig
from clipgraft.heads.zero_shot import ZeroShotConfig, ZeroShotHead


def blobs(n: int = 200, dim: int = 6, classes: int = 3, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    centers = torch.randn(classes, dim, generator=rng)
    features = 5 + 3 * (centers[labels] + noise * torch.randn(n, dim, generator=rng))
    order = torch.randperm(n, generator=rng)
    return features[order].double(), labels[order]


def test_zero_shot_head_is_a_scaled_cosine_and_survives_its_state() -> None:
    rng = torch.Generator().manual_seed(0)
    weights, images = torch.randn(3, 5, generator=rng), torch.randn(7, 5, generator=rng)
    head = ZeroShotHead(**ZeroShotConfig(dim=5, classes=3).model_dump())
    head.load_state_dict({"weights": weights})
    expected = 100 * F.cosine_similarity(images[:, None], weights[None], dim=-1)
    assert torch.allclose(head(images), expected, atol=1e-4)
    assert torch.allclose(head(images * 9), expected, atol=1e-4)
    assert list(head.parameters()) == []


@pytest.mark.parametrize("decay", [1.0, 1e-3])
@pytest.mark.parametrize("shape", [(120, 6), (30, 50)])
def test_logistic_regression_equals_scikit_learn(decay: float, shape: tuple[int, int]) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = blobs(*shape)
    z = (x - x.mean(0)) / x.std(0, correction=0)
    weight, bias = LinearProbe(dim=shape[1], classes=3)._lbfgs(z, y, decay)
    model = linear_model.LogisticRegression(C=1 / (decay * len(z)), tol=1e-8, max_iter=5000).fit(z.numpy(), y.numpy())
    expected = torch.from_numpy(model.predict_proba(z.numpy()))
    assert torch.allclose(F.linear(z, weight, bias).softmax(1), expected, atol=2e-4)


@pytest.mark.parametrize("shape", [(120, 6), (30, 50)])
def test_ridge_equals_scikit_learn(shape: tuple[int, int]) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = blobs(*shape)
    weight, bias = LinearProbe(dim=shape[1], classes=3)._ridge(x, y, 0.1)
    model = linear_model.Ridge(alpha=0.1 * len(x)).fit(x.numpy(), F.one_hot(y).numpy())
    assert torch.allclose(weight, torch.from_numpy(model.coef_), atol=1e-8)
    assert torch.allclose(bias, torch.from_numpy(model.intercept_), atol=1e-8)


@pytest.mark.parametrize("solver", ["lbfgs", "ridge"])
def test_fit_learns_is_deterministic_and_survives_its_state(solver: str) -> None:
    x, y = blobs(noise=0.3)
    config = LinearProbeConfig(dim=6, classes=3, solver=solver)
    torch.manual_seed(0)
    first = LinearProbe(**config.model_dump()).fit(x[:150].float(), y[:150])
    torch.manual_seed(1)
    second = LinearProbe(**config.model_dump()).fit(x[:150].float(), y[:150])
    assert all(torch.equal(a, b) for a, b in zip(first.buffers(), second.buffers(), strict=True))
    assert float((first(x[150:].float()).argmax(1) == y[150:]).float().mean()) > 0.9
    stored = LinearProbe(**config.model_dump())
    stored.load_state_dict(first.state_dict())
    assert torch.equal(stored(x.float()), first(x.float()))


@pytest.mark.parametrize("solver", ["lbfgs", "ridge"])
def test_units_of_the_features_do_not_matter(solver: str) -> None:
    x, y = blobs()
    scale = torch.tensor([1e-3, 1e3, 1.0, 5.0, 0.1, 1.0], dtype=torch.float64)
    first = LinearProbe(dim=6, classes=3, solver=solver).fit(x, y)
    second = LinearProbe(dim=6, classes=3, solver=solver).fit(x * scale + 3, y)
    assert torch.allclose(first(x), second(x * scale + 3), atol=1e-6)


def test_a_feature_that_never_varies_is_harmless() -> None:
    x, y = blobs()
    x[:, 2] = 4.0
    probe = LinearProbe(dim=6, classes=3).fit(x[:150], y[:150])
    x[150:, 2] = 4.1
    assert probe(x[150:]).isfinite().all()
    assert float((probe(x[150:]).argmax(1) == y[150:]).float().mean()) > 0.5


def test_the_decay_is_chosen_by_what_was_held_out() -> None:
    """Every fifth row is never fitted to before the choice; the last fit takes all rows."""
    x, y = blobs(n=100, dim=45, classes=8, noise=3.0)
    z = (x - x.mean(0)) / x.std(0, correction=0)
    held = torch.arange(100) % 5 == 0
    probe, seen = LinearProbe(dim=45, classes=8, solver="ridge"), []
    solve = probe._ridge

    def spy(rows: Tensor, labels: Tensor, decay: float) -> tuple[Tensor, Tensor]:
        seen.append((len(rows), decay))
        return solve(rows, labels, decay)

    probe._ridge = spy
    probe.fit(x, y)
    assert seen[:-1] == [(80, decay) for decay in DECAYS] and seen[-1][0] == 100
    scores = {}
    for decay in DECAYS:
        weight, bias = solve(z[~held], y[~held], decay)
        scores[decay] = float((F.linear(z[held], weight, bias).argmax(1) == y[held]).double().mean())
    assert seen[-1][1] == max(d for d in DECAYS if scores[d] == max(scores.values()))
    assert max(scores.values()) > scores[DECAYS[0]] and max(scores.values()) > scores[DECAYS[-1]]


def test_too_little_to_fit_is_one_line() -> None:
    x, y = blobs()
    for rows, labels in ((x[:9], y[:9]), (x, torch.zeros_like(y))):
        with pytest.raises(InputError, match="needs 10 samples and two classes"):
            LinearProbe(dim=6, classes=3).fit(rows, labels)
