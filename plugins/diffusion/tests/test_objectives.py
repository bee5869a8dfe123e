"""The objectives by name: against calculations by hand, and the same as what the recipes judge by."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clipgraft.errors import InputError
from clipgraft.registry import Registry
from clipgraft_diffusion.condition import Condition, GlobalCondition, projector
from clipgraft_diffusion.denoiser import FluxDenoiser
from clipgraft_diffusion.eps import EpsObjective, NoiseSchedule
from clipgraft_diffusion.feedback import Feedback
from clipgraft_diffusion.flow import LogitNormal
from clipgraft_diffusion.masked import MaskedFeedback, MaskLaw
from clipgraft_diffusion.perceiver import Perceiver

B, L, K = 4, 12, 30
REGISTRY = Registry.discover(allow=["diffusion"])
LOSSES = [r.component.name for r in REGISTRY.list("loss") if r.plugin == "diffusion"]
"""Every loss of this plugin has the same interface."""


@pytest.fixture(scope="module")
def registry():
    return REGISTRY


def test_the_objectives_are_there():
    assert {"eps", "v", "flow", "masked-token"} <= set(LOSSES)


class Told:
    """A denoiser that says ``told`` (B,) plus a tenth of what it sees, and remembers what it was asked."""

    def __call__(self, x_t, t, told):
        self.x_t, self.t = x_t, t
        return 0.1 * x_t + told.view(-1, *[1] * (x_t.ndim - 1))


class Codes(nn.Module):
    """A predictor of hidden codes that isn't the Perceiver: shown codes' mean plus what it is told."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(K, 6), nn.Linear(6, K)

    def embed(self, indices):
        return self.table(indices)

    def forward(self, embeddings, shown, hidden, told):
        mean = embeddings.gather(1, shown[..., None].expand(-1, -1, 6)).mean(1) + told[:, None]
        return self.head(mean)[:, None].expand(-1, hidden.shape[1], -1)


def case(name, shape=(B, 4, 8, 8)):
    """Denoiser, clean latent and condition for the loss ``name``."""
    g = torch.Generator().manual_seed(0)
    told = torch.randn(B, generator=g)
    if name == "masked-token":
        return Codes(), torch.randint(0, K, (B, L), generator=g), told
    return Told(), torch.randn(shape, generator=g), told


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_per_sample_follow_the_generator_and_reach_the_condition(registry, name):
    loss = registry.build("loss", f"diffusion/{name}", {})
    denoiser, x0, told = case(name)
    told.requires_grad_()
    losses = loss(denoiser, x0, told, seeded(1))
    assert losses.shape == (B,)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, loss(denoiser, x0, told, seeded(1)))
    assert not torch.equal(losses, loss(denoiser, x0, told, seeded(2)))
    torch.manual_seed(1)
    assert torch.equal(losses, loss(denoiser, x0, told)), "without a generator the global one is drawn from"
    (gradient,) = torch.autograd.grad(losses[1], told)
    assert gradient[1] != 0
    assert not gradient[[0, 2, 3]].any(), "a sample's loss hears its own condition alone"


@pytest.mark.parametrize("name", LOSSES)
def test_inner_draws_are_averaged_not_summed(registry, name):
    denoiser, x0, told = case(name)
    one, three = (registry.build("loss", f"diffusion/{name}", {"draws": n}) for n in (1, 3))
    g = seeded(5)
    each = [one(denoiser, x0, told, g) for _ in range(3)]
    assert not torch.equal(each[0], each[1])
    torch.testing.assert_close(three(denoiser, x0, told, seeded(5)), (each[0] + each[1] + each[2]) / 3)


@pytest.mark.parametrize("name", LOSSES)
def test_the_two_halves_make_the_whole(registry, name):
    loss = registry.build("loss", f"diffusion/{name}", {})
    denoiser, x0, told = case(name)
    drawn = loss.draw(x0, seeded(3))
    drawn = drawn if isinstance(drawn, tuple) else (drawn,)
    assert torch.equal(loss.at(denoiser, x0, told, *drawn), loss(denoiser, x0, told, seeded(3)))


def alphas():
    return torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)


@pytest.mark.parametrize("shape", [(B, 4, 8, 8), (B, 5, 3)])
@pytest.mark.parametrize("error", ["noise", "sample"])
def test_eps_and_v_by_hand(registry, shape, error):
    denoiser, x0, told = case("eps", shape)
    for name in ("eps", "v"):
        loss = registry.build("loss", f"diffusion/{name}", {"low": 100, "high": 300, "error": error})
        found = loss(denoiser, x0, told, seeded(1))
        g = seeded(1)
        t, noise = torch.randint(100, 300, (B,), generator=g), torch.randn(shape, generator=g)
        assert torch.equal(denoiser.t, t)
        share = alphas()[t].view(-1, *[1] * (len(shape) - 1))
        x_t = share.sqrt() * x0 + (1 - share).sqrt() * noise
        said = 0.1 * x_t + told.view(-1, *[1] * (len(shape) - 1))
        if name == "eps":
            clean, wanted = (x_t - (1 - share).sqrt() * said) / share.sqrt(), noise
        else:
            clean, wanted = (
                share.sqrt() * x_t - (1 - share).sqrt() * said,
                share.sqrt() * noise - (1 - share).sqrt() * x0,
            )
        squares = (clean - x0).square() if error == "sample" else (said - wanted).square()
        torch.testing.assert_close(found, squares.flatten(1).mean(1), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("shape", [(B, 4, 8, 8), (B, 5, 3)])
def test_flow_by_hand(registry, shape):
    denoiser, x0, told = case("flow", shape)
    for prediction in ("velocity", "sample"):
        loss = registry.build("loss", "diffusion/flow", {"scale": 0.5, "prediction": prediction})
        found = loss(denoiser, x0, told, seeded(1))
        g = seeded(1)
        t, noise = torch.sigmoid(0.5 * torch.randn(B, generator=g)), torch.randn(shape, generator=g)
        torch.testing.assert_close(denoiser.t, t)
        level = t.view(-1, *[1] * (len(shape) - 1))
        x_t = (1 - level) * x0 + level * noise
        said = 0.1 * x_t + told.view(-1, *[1] * (len(shape) - 1))
        said = said if prediction == "velocity" else (x_t - said) / level
        torch.testing.assert_close(found, (said - (noise - x0)).square().flatten(1).mean(1), rtol=1e-4, atol=1e-5)


def test_masked_token_by_hand(registry):
    denoiser, codes, told = case("masked-token")
    loss = registry.build("loss", "diffusion/masked-token", {"low": 0.25, "high": 0.25})
    mask = loss.draw(codes, seeded(1))
    assert mask.hidden.shape == (B, 3)
    found = loss(denoiser, codes, told, seeded(1))
    for b in range(B):
        mean = denoiser.table(codes[b, mask.shown[b]]).mean(0) + told[b]
        log_p = F.log_softmax(denoiser.head(mean), -1)
        torch.testing.assert_close(found[b], -log_p[codes[b, mask.hidden[b]]].mean())


def test_laws_of_times_and_the_range_of_steps_are_settings(registry):
    x0 = torch.zeros(5000, 1)

    def drawn(name, **settings):
        return registry.build("loss", f"diffusion/{name}", settings).draw(x0, seeded(0))[0]

    narrow, wide = drawn("flow", scale=0.1), drawn("flow", scale=10.0)
    assert narrow.std() < 0.03 < 0.4 < wide.std()
    flat = drawn("flow", law="uniform", low=0.9, high=0.95)
    assert flat.min() >= 0.9
    assert flat.max() <= 0.95
    steps = drawn("v", low=7, high=9)
    assert set(steps.tolist()) == {7, 8}
    assert int(drawn("eps", steps=10).max()) == 9


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("eps", {"low": 900, "high": 900}, "low 900 must be below high 900"),
        ("v", {"high": 1001}, "at most steps 1000"),
        ("eps", {"draws": 0}, "draws must be greater than 0"),
        ("flow", {"law": "uniform", "low": 0.9, "high": 0.1}, "low 0.9 must be below high 0.1"),
        ("flow", {"law": "beta"}, "law"),
        ("masked-token", {"low": 0.9, "high": 0.5}, "low 0.9 must not be above high 0.5"),
    ],
)
def test_bad_settings_are_named(registry, name, settings, said):
    with pytest.raises(InputError, match=said):
        registry.build("loss", f"diffusion/{name}", settings)


def test_the_recipes_judge_by_the_same_objects(registry):
    torch.manual_seed(0)
    x0, noise_told = torch.randn(B, 4, 8, 8), torch.randn(B)
    objective = EpsObjective(NoiseSchedule(), Told(), low=5, high=50, error="sample", target="velocity")
    named = registry.build("loss", "diffusion/v", {"low": 5, "high": 50, "error": "sample"})
    t, noise = objective.draw(x0, seeded(1))
    assert torch.equal(objective(x0, noise_told, t, noise), named(Told(), x0, noise_told, seeded(1)))

    flux = FluxDenoiser(3, (2, 2), width=16, heads=2, depth=1, single_depth=1, vec_dim=8, txt_dim=8)
    flow = Feedback(GlobalCondition(6, vec_dim=8, txt_dim=8), flux, times=LogitNormal(0.7))
    z, x1 = torch.randn(B, 6), torch.randn(B, 4, 3)
    named = registry.build("loss", "diffusion/flow", {"scale": 0.7})
    assert torch.equal(flow(z, x1, seeded(1)), named(flux, x1, flow.condition(z), seeded(1)))

    perceiver = Perceiver(torch.randn(K, 5), (3, 4), width=16, heads=2, layers=1)
    masked = MaskedFeedback(projector(6, 16), perceiver, masks=MaskLaw(0.3, 0.6))
    codes = torch.randint(0, K, (B, L))
    named = registry.build("loss", "diffusion/masked-token", {"low": 0.3, "high": 0.6})
    assert torch.equal(masked(z, codes, seeded(1)), named(perceiver, codes, masked.condition(z), seeded(1)))


def test_the_global_token_by_name(registry):
    head = registry.build("head", "diffusion/global-token", {"embed_dim": 6, "vec_dim": 8, "txt_dim": 10})
    told = head(torch.randn(3, 6))
    assert isinstance(told, Condition)
    assert (told.vec.shape, told.txt.shape) == ((3, 8), (3, 1, 10))
    with pytest.raises(InputError, match="embed_dim"):
        registry.build("head", "diffusion/global-token", {})
