import math

import pytest
import torch

from clipgraft_diffusion.flow import (
    LogitNormal,
    Uniform,
    flow_losses,
    mix,
    network_time,
    velocity,
    velocity_of_sample,
)

CPU = torch.device("cpu")


def draw(law, n=200_000):
    return law.sample(n, device=CPU, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("scale", "near_half"), [(1.0, 0.314), (0.1, 1.0), (10.0, 0.033)])
def test_g10_logit_normal_law(scale, near_half):
    t = draw(LogitNormal(scale))
    assert t.mean() == pytest.approx(0.5, abs=2e-3)
    assert ((t - 0.5).abs() < 0.1).float().mean() == pytest.approx(near_half, abs=3e-3)
    if scale == 1:
        assert t.std() == pytest.approx(0.209, abs=1e-3)


def test_uniform_law_stays_in_its_range():
    t = draw(Uniform(0.98, 1.0), 10_000)
    assert t.min() >= 0.98
    assert t.max() <= 1.0
    assert t.mean() == pytest.approx(0.99, abs=1e-3)


def test_g09_loss_is_mse_against_noise_minus_data_in_fp32():
    g = torch.Generator().manual_seed(1)
    x1, x0, predicted = (torch.randn(3, 5, 7, generator=g) for _ in range(3))
    losses = flow_losses(predicted.bfloat16(), velocity(x1, x0))
    assert losses.dtype == torch.float32
    assert losses.shape == (3,)
    reference = torch.nn.functional.mse_loss(predicted.bfloat16().float(), x0 - x1)
    assert losses.mean() == pytest.approx(reference.item(), rel=1e-6)


def test_mix_runs_from_data_to_noise_along_the_velocity():
    g = torch.Generator().manual_seed(2)
    x1, x0 = torch.randn(2, 4, 3, generator=g), torch.randn(2, 4, 3, generator=g)
    torch.testing.assert_close(mix(x1, x0, torch.zeros(2)), x1)
    torch.testing.assert_close(mix(x1, x0, torch.ones(2)), x0)
    t = torch.tensor([0.3, 0.8])
    torch.testing.assert_close(mix(x1, x0, t + 0.1) - mix(x1, x0, t), 0.1 * velocity(x1, x0))


def test_g14_paper_convention_is_the_mirror_image():
    """Paper: x = t x1 + (1 - t) x0, target x1 - x0. With t -> 1 - t and the sign flipped it is the code's."""
    g = torch.Generator().manual_seed(3)
    x1, x0 = (torch.randn(4, 2, 2, generator=g, dtype=torch.float64) for _ in range(2))
    t = torch.rand(4, generator=g, dtype=torch.float64)
    paper = t[:, None, None] * x1 + (1 - t)[:, None, None] * x0
    assert torch.equal(mix(x1, x0, 1 - t), paper) or (mix(x1, x0, 1 - t) - paper).abs().max() < 1e-15
    assert torch.equal(-velocity(x1, x0), x1 - x0)
    # equal in law only because the noise levels are symmetric about one half
    t = draw(LogitNormal(1.0))
    quantiles = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    torch.testing.assert_close(t.quantile(quantiles), (1 - t).quantile(quantiles), atol=5e-3, rtol=0)


def test_velocity_of_a_perfect_sample_is_the_velocity():
    g = torch.Generator().manual_seed(4)
    x1, x0, t = torch.randn(2, 4, 3, generator=g), torch.randn(2, 4, 3, generator=g), torch.tensor([0.2, 0.99])
    torch.testing.assert_close(velocity_of_sample(mix(x1, x0, t), x1, t), velocity(x1, x0), atol=1e-5, rtol=1e-5)
    assert velocity_of_sample(x0, x1, torch.zeros(2)).isfinite().all()


@pytest.mark.parametrize(("t", "seen"), [(0.1234, 123.5), (0.4567, 458.0), (0.789, 788.0)])
def test_official_timestep_is_formed_in_bf16(t, seen):
    exact = torch.tensor([t])
    assert 1000 * network_time(exact, compat="official").item() == pytest.approx(seen, abs=1e-3)
    assert 1000 * network_time(exact, compat="fixed").item() == pytest.approx(1000 * t, rel=1e-6)
    assert not math.isclose(seen, 1000 * t, abs_tol=0.05)


def test_the_noisy_latent_is_that_of_diffusers_flow_matching_scheduler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    sigma = scheduler.sigmas[[0, 250, 999]]
    g = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(3, 4, 8, generator=g), torch.randn(3, 4, 8, generator=g)
    theirs = scheduler.scale_noise(clean, scheduler.timesteps[[0, 250, 999]], noise)
    torch.testing.assert_close(mix(clean, noise, sigma), theirs)
