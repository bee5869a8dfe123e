import pytest
import torch
from torch.nn import functional as F

from clipgraft_diffusion.anchor import Anchor


def embeddings(n=6, d=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), F.normalize(torch.randn(4, d, generator=g), dim=-1)


def test_no_change_costs_nothing():
    z, classes = embeddings()
    assert Anchor(classes)(z, z).item() == pytest.approx(0, abs=1e-6)
    assert Anchor(None)(z, z).item() == pytest.approx(0, abs=1e-6)


def test_kl_equals_the_definition_and_ignores_norms():
    z, classes = embeddings()
    base = embeddings(seed=1)[0]
    p = F.softmax(20 * F.normalize(base, dim=-1) @ classes.T, -1)
    q = F.softmax(20 * F.normalize(z, dim=-1) @ classes.T, -1)
    wanted = (p * (p / q).log()).sum(-1).mean().item()
    anchor = Anchor(classes, temperature=20.0)
    assert anchor(z, base).item() == pytest.approx(wanted, rel=1e-5)
    assert anchor(3 * z, 0.1 * base).item() == pytest.approx(wanted, rel=1e-5)


def test_the_base_gets_no_gradient_and_the_temperature_does():
    z, classes = embeddings()
    base = embeddings(seed=1)[0].requires_grad_()
    anchor = Anchor(classes, temperature=20.0, learn_temperature=True)
    anchor(z.requires_grad_(), base).backward()
    assert base.grad is None
    assert z.grad.abs().sum() > 0
    assert anchor.log_temperature.grad.abs() > 0


def test_cosine_without_classes_has_no_temperature_to_learn():
    assert list(Anchor(None, learn_temperature=True).parameters()) == []
    z = torch.eye(2)
    assert Anchor(None)(z, z.flip(0)).item() == pytest.approx(1)
