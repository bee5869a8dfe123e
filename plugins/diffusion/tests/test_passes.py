"""Fact D11: how gradients of several passes add up, against plain autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clipgraft_diffusion.passes import pass_weights, several_passes


@pytest.fixture
def parts():
    torch.manual_seed(0)
    tower, critic = nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()).requires_grad_(False)
    targets = [torch.randn(5, 2, 4) for _ in range(3)]
    x = torch.randn(5, 2, 3)

    def losses():
        return [(critic(tower(x)) - target).square().mean() for target in targets]

    def pairs(n=3):
        for target in targets[:n]:
            yield tower(x), lambda c, target=target: (critic(c) - target).square().mean()

    return tower, losses, pairs


def gradient(tower, loss):
    tower.zero_grad()
    loss.backward()
    return tower.weight.grad.clone()


@pytest.mark.parametrize("accumulate", [1, 5])
def test_d11_official_gradient_is_g1_plus_g2_over_the_accumulation(parts, accumulate):
    tower, losses, pairs = parts
    g1, g2 = gradient(tower, losses()[0]), gradient(tower, losses()[1])
    loss = several_passes(
        pairs(2), weights=pass_weights(2, accumulate=accumulate, compat="official"), compat="official"
    )
    found = gradient(tower, loss / accumulate)  # the trainer divides every micro-batch
    torch.testing.assert_close(found, g1 + g2 / accumulate)
    torch.testing.assert_close(loss.detach(), losses()[1].detach())  # what the official code logs


def test_d11_fixed_gradient_is_the_mean(parts):
    tower, losses, pairs = parts
    wanted = gradient(tower, sum(losses()) / 3)
    loss = several_passes(pairs(), weights=pass_weights(3, accumulate=5, compat="fixed"))
    torch.testing.assert_close(gradient(tower, loss / 5), wanted / 5)
    torch.testing.assert_close(loss.detach(), (sum(losses()) / 3).detach())


def test_only_one_pass_is_held_in_memory(parts):
    """The graph of a pass is gone when the next one starts."""
    tower, _, _ = parts
    alive = []

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            alive.append(ctx)
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            alive.remove(ctx)
            return g

    def run(condition):
        assert not alive
        return Counted.apply(condition).square().mean()

    x = torch.randn(2, 1, 3)
    loss = several_passes(((tower(x), run) for _ in range(3)), weights=[1, 1, 1])
    loss.backward()
    assert tower.weight.grad.abs().sum() > 0


def test_each_condition_needs_a_weight(parts):
    with pytest.raises(ValueError, match="zip"):
        several_passes(parts[2](), weights=[1.0, 1.0])
