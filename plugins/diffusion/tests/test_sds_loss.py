"""Score distillation and the map: what the method's formulas imply."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from clipgraft.errors import InputError
from clipgraft.registry import Registry
from clipgraft_diffusion.sds.loss import SdsLoss
from clipgraft_diffusion.sds.mapper import LatentMapper, LatentMapperConfig, size

REGISTRY = Registry.discover(allow=["diffusion"])


class Unet(nn.Module):
    """A random nonlinear denoiser of latents (B, 2, 3, 3), told (B, 4)."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.one = nn.Parameter(torch.randn(18 + 4 + 1, 32, generator=g) / 3, requires_grad=False)
        self.two = nn.Parameter(torch.randn(32, 18, generator=g) / 3, requires_grad=False)

    def forward(self, x_t, t, condition):
        told = torch.cat([x_t.flatten(1), condition, t[:, None] / 1000], 1)
        return ((told @ self.one).tanh() @ self.two).view_as(x_t)


def setting(**more):
    g = torch.Generator().manual_seed(1)
    loss = REGISTRY.build("loss", "diffusion/sds", more)
    u, told = torch.randn(5, 2, 3, 3, generator=g), torch.randn(5, 4, generator=g)
    return loss, u.requires_grad_(), told, torch.tensor([0, 200, 500, 900, 999]), torch.randn(5, 2, 3, 3, generator=g)


def errors(loss, u, told, t, noise):
    """The squared error and e = predicted noise - noise, by hand."""
    share = loss.schedule.alphas[t].view(-1, 1, 1, 1)
    e = Unet()(share.sqrt() * u + (1 - share).sqrt() * noise, t, told) - noise
    return e, share


@pytest.mark.parametrize("weighting", ["one", "signal", "variance"])
@pytest.mark.parametrize("error", ["noise", "sample"])
def test_full_is_the_mean_squared_error_of_the_noise_weighed_by_w(weighting, error):
    loss, u, told, t, noise = setting(weighting=weighting, error=error)
    e, share = errors(loss, u, told, t, noise)
    w = {"one": torch.ones(5), "signal": share.sqrt().flatten(), "variance": 1 - share.flatten()}[weighting]
    w = w * ((1 - share) / share).flatten() if error == "sample" else w
    torch.testing.assert_close(loss.at(Unet(), u, told, t, noise), w * e.square().mean((1, 2, 3)))


@pytest.mark.parametrize("weighting", ["one", "signal", "variance"])
@pytest.mark.parametrize("error", ["noise", "sample"])
def test_s06_the_gradient_of_the_surrogate_is_that_of_g_times_u(weighting, error):
    loss, u, told, t, noise = setting(jacobian="none", weighting=weighting, error=error)
    (found,) = torch.autograd.grad(loss.at(Unet(), u, told, t, noise).sum(), u)
    e, share = errors(loss, u.detach(), told, t, noise)
    w = {"one": torch.ones_like(share), "signal": share.sqrt(), "variance": 1 - share}[weighting]
    g = w * (((1 - share) / share).sqrt() if error == "sample" else 1) * e
    (wanted,) = torch.autograd.grad((g.detach() * u).mean((1, 2, 3)).sum(), u)
    assert (found - wanted).abs().max() < 1e-6 * max(1, wanted.abs().max())


def test_with_error_sample_g_is_the_way_to_the_clean_latent_that_the_generator_sees():
    loss, u, told, t, noise = setting(jacobian="none", error="sample")
    (found,) = torch.autograd.grad(loss.at(Unet(), u, told, t, noise).sum(), u)
    share = loss.schedule.alphas[t].view(-1, 1, 1, 1)
    x_t = (share.sqrt() * u + (1 - share).sqrt() * noise).detach()
    clean = (x_t - (1 - share).sqrt() * Unet()(x_t, t, told)) / share.sqrt()
    torch.testing.assert_close(found, (u.detach() - clean) / 18, atol=1e-5, rtol=1e-4)


def test_s07_through_the_generator_the_gradient_is_another_one():
    full, u, told, t, noise = setting()
    none = REGISTRY.build("loss", "diffusion/sds", {"jacobian": "none"})
    one, other = (
        torch.autograd.grad(loss.at(Unet(), u, told, t, noise).sum(), u)[0].flatten() for loss in (full, none)
    )
    assert torch.nn.functional.cosine_similarity(one, other, 0) < 0.9


@pytest.mark.parametrize("jacobian", ["full", "none"])
def test_s08_a_generator_that_names_the_noise_leaves_no_gradient(jacobian):
    loss, u, told, t, noise = setting(jacobian=jacobian)

    def oracle(x_t, t, condition):
        share = loss.schedule.alphas[t].view(-1, 1, 1, 1)
        return (x_t - share.sqrt() * u) / (1 - share).sqrt()  # its Jacobian by u is zero: x_t moves along

    losses = loss.at(oracle, u, told, t, noise)
    (gradient,) = torch.autograd.grad(losses.sum(), u)
    assert losses.max() < 1e-6
    assert gradient.abs().max() < 1e-4


def test_none_keeps_no_graph_of_the_generator():
    loss, u, told, t, noise = setting(jacobian="none")
    grads = []

    def denoiser(x_t, t, condition):
        grads.append(torch.is_grad_enabled())
        return Unet()(x_t, t, condition)

    loss.at(denoiser, u, told, t, noise).sum().backward()
    assert grads == [False]


def test_s12_the_mean_makes_the_loss_free_of_the_latents_size():
    """A sum over 4 x 64 x 64 entries would weigh 16,384 times as much."""
    loss = REGISTRY.build("loss", "diffusion/sds", {})
    u, t, noise = torch.zeros(1, 4, 64, 64), torch.tensor([500]), torch.zeros(1, 4, 64, 64)
    found = loss.at(lambda x_t, t, condition: torch.full_like(x_t, 3.0), u, None, t, noise)
    torch.testing.assert_close(found, torch.tensor([9.0]))
    half = REGISTRY.build("loss", "diffusion/sds", {"jacobian": "none"})
    torch.testing.assert_close(
        half.at(lambda x_t, t, condition: torch.full_like(x_t, 3.0), u, None, t, noise), torch.tensor([4.5])
    )


def test_draws_are_averaged_and_reproducible():
    loss, u, told, *_ = setting(draws=3)
    found = loss(Unet(), u, told, torch.Generator().manual_seed(7))
    g = torch.Generator().manual_seed(7)
    wanted = torch.stack([loss.at(Unet(), u, told, *loss.draw(u, g)) for _ in range(3)]).mean(0)
    assert found.shape == (5,)
    assert torch.equal(found, wanted)
    assert isinstance(loss, SdsLoss)


def test_s01_the_latent_is_h_of_z_in_the_generators_shape():
    mapper = LatentMapper(6, latent=(4, 64, 64), unit=False)
    z = torch.randn(3, 6)
    assert mapper(z).shape == (3, 4, 64, 64)
    assert torch.equal(mapper(z), mapper.linear(z).view(3, 4, 64, 64))
    assert LatentMapper(6, latent=(16, 8))(z).shape == (3, 16, 8)


def test_s02_sizes_of_h():
    """8.40 million weights for embeddings of 512, 12.60 for 768 (a latent of 4 x 64 x 64)."""
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in LatentMapper(d).parameters()) for d in (512, 768)]
    assert sizes == [512 * 16384 + 16384, 768 * 16384 + 16384]
    assert [round(n / 1e6, 2) for n in sizes] == [8.40, 12.60]


def test_unit_takes_the_direction_alone_and_the_size_is_logged():
    mapper, z = LatentMapper(6, latent=(5,)), torch.randn(3, 6)
    torch.testing.assert_close(mapper(z), mapper(7 * z))
    raw = LatentMapper(6, latent=(5,), unit=False)
    assert not torch.allclose(raw(z), raw(7 * z))
    torch.testing.assert_close(size(3 * torch.ones(2, 4, 5)), torch.full((2,), 3.0).log())
    built = REGISTRY.build("head", "diffusion/latent-mapper", {"embed_dim": 6, "latent": [2, 3]})
    assert built(z).shape == (3, 2, 3)


def test_bad_settings():
    with pytest.raises(InputError, match="jacobian"):
        REGISTRY.build("loss", "diffusion/sds", {"jacobian": "half"})
    with pytest.raises(InputError, match="below"):
        REGISTRY.build("loss", "diffusion/sds", {"low": 900, "high": 900})
    with pytest.raises(ValidationError, match="positive"):
        LatentMapperConfig(embed_dim=4, latent=(4, 0, 8))
