import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clipgraft_diffusion.eps import EpsObjective, NoiseSchedule


class Echo(nn.Module):
    """Names the condition's mean as the noise."""

    width = 2

    def forward(self, x_t, t, condition):
        self.seen = x_t, t
        return condition.mean() * torch.ones_like(x_t)


def draw(shape=(4, 4, 8, 8), seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g), torch.randn(shape, generator=g), torch.tensor([0, 10, 500, 999])


def test_d13_alphas_and_mixing_are_diffusers_and_eulers_add_noise_is_another_thing():
    from diffusers import DDPMScheduler, EulerDiscreteScheduler

    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
    ddpm, euler, ours = DDPMScheduler(**settings), EulerDiscreteScheduler(**settings), NoiseSchedule()
    assert torch.equal(ours.alphas, ddpm.alphas_cumprod)
    assert torch.equal(ours.alphas, euler.alphas_cumprod)
    by_hand = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
    torch.testing.assert_close(ours.alphas, by_hand)
    x0, noise, t = draw()
    mixed = ours.mix(x0, noise, t)
    torch.testing.assert_close(mixed, ddpm.add_noise(x0, noise, t))
    euler.set_timesteps(1000)
    assert (euler.add_noise(x0, noise, t.float()) - mixed).abs().max() > 10


def test_d05_loss_is_the_mean_squared_error_of_the_noise():
    denoiser = Echo()
    objective = EpsObjective(NoiseSchedule(), denoiser)
    (x0, noise, t), condition = draw(), torch.full((4, 3, 2), 0.3)
    losses = objective(x0, condition, t, noise)
    assert losses.shape == (4,)
    torch.testing.assert_close(losses.mean(), F.mse_loss(torch.full_like(noise, 0.3), noise))
    assert torch.equal(denoiser.seen[0], objective.schedule.mix(x0, noise, t))
    assert denoiser.seen[1] is t


def test_error_in_the_clean_latent_is_that_of_the_sample_that_the_named_noise_implies():
    (x0, noise, t), schedule = draw(), NoiseSchedule()
    losses = EpsObjective(schedule, Echo(), error="sample")(x0, torch.full((4, 3, 2), 0.3), t, noise)
    share = schedule.alphas[t][:, None, None, None].double()
    x_t = schedule.mix(x0, noise, t).double()
    sample = (x_t - (1 - share).sqrt() * 0.3) / share.sqrt()
    torch.testing.assert_close(losses.double(), (sample - x0).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-6)


def test_steps_come_before_noise_and_stay_in_their_range():
    objective = EpsObjective(NoiseSchedule(), Echo(), low=870, high=990)
    x0, _, _ = draw()
    torch.manual_seed(5)
    t, noise = objective.draw(x0)
    torch.manual_seed(5)
    assert torch.equal(t, torch.randint(870, 990, (4,)))
    assert torch.equal(noise, torch.randn(4, 4, 8, 8))
    many = EpsObjective(NoiseSchedule(), Echo()).draw(torch.zeros(20_000, 1))[0]
    assert (int(many.min()), int(many.max())) == (0, 999)
    assert many.float().mean() == pytest.approx(499.5, abs=10)


def test_u04_v_and_noise_are_two_names_of_one_thing():
    (x0, noise, t), schedule = draw(), NoiseSchedule()
    share = schedule.alphas[t][:, None, None, None]
    v, x_t = schedule.velocity(x0, noise, t), schedule.mix(x0, noise, t)
    torch.testing.assert_close(v, share.sqrt() * noise - (1 - share).sqrt() * x0)
    torch.testing.assert_close(schedule.noise_of_velocity(v, x_t, t), noise, atol=1e-5, rtol=1e-5)


def test_u05_the_error_of_v_is_that_of_the_noise_it_implies_weighed_by_one_over_alpha_and_diffusers_agrees():
    from diffusers import DDPMScheduler

    (x0, noise, t), schedule = draw(), NoiseSchedule()
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    torch.testing.assert_close(schedule.velocity(x0, noise, t), DDPMScheduler(**settings).get_velocity(x0, noise, t))
    told = torch.full((4, 3, 2), 0.3)
    losses = EpsObjective(schedule, Echo(), target="velocity")(x0, told, t, noise)
    implied = schedule.noise_of_velocity(torch.full_like(x0, 0.3), schedule.mix(x0, noise, t), t)
    errors = (implied - noise).square().mean((1, 2, 3))
    torch.testing.assert_close(losses, errors / schedule.alphas[t], rtol=1e-4, atol=1e-5)
    in_sample = EpsObjective(schedule, Echo(), target="velocity", error="sample")(x0, told, t, noise)
    torch.testing.assert_close(in_sample, losses * (1 - schedule.alphas[t]))
