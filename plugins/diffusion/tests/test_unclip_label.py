"""The label that an unCLIP decoder is told, against diffusers' pipeline and by hand."""

from __future__ import annotations

import types

import pytest
import torch
from pydantic import ValidationError

from clipgraft.errors import ClipgraftError, InputError
from clipgraft.registry import Registry
from clipgraft_diffusion.unclip.label import LEVELS, UnclipLabel, UnclipLabelConfig, sinusoid


def embeddings(n=5, width=16, seed=0):
    return 2 * torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) + 1


def released(width=16):
    """A normaliser as the released models have it, with other statistics than 0 and 1."""
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    normalizer = StableUnCLIPImageNormalizer(embedding_dim=width)
    with torch.no_grad():
        normalizer.mean.copy_(torch.linspace(-1, 1, width)[None])
        normalizer.std.copy_(torch.linspace(0.5, 2, width)[None])
    return normalizer


def like(normalizer, **more):
    label = UnclipLabel(embed_dim=normalizer.mean.shape[1], **more)
    label.mean.copy_(normalizer.mean.detach())
    label.std.copy_(normalizer.std.detach())
    return label


@pytest.mark.parametrize("level", [0, 1, 300, 999])
@pytest.mark.parametrize("width", [16, 7])
def test_p6_the_label_is_that_of_diffusers_pipeline_given_the_same_noise(level, width):
    from diffusers import DDPMScheduler, StableUnCLIPImg2ImgPipeline

    normalizer = released(width)
    stub = types.SimpleNamespace(
        image_normalizer=normalizer, image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    )
    z, noise = embeddings(width=width), embeddings(width=width, seed=1)
    wanted = StableUnCLIPImg2ImgPipeline.noise_image_embeddings(stub, z, noise_level=level, noise=noise)
    found = like(normalizer, noise_level=level)(z, noise=noise)
    torch.testing.assert_close(found, wanted.detach(), atol=1e-5, rtol=1e-5)


def test_u01_labels_are_twice_as_wide_and_say_the_level_alike_for_all():
    found = UnclipLabel(embed_dim=16, noise_level=40)(embeddings())
    assert found.shape == (5, 32)
    assert torch.equal(found[:, 16:], found[:1, 16:].expand(5, -1))
    frequencies = 10_000 ** (-torch.arange(8) / 8)
    by_hand = torch.cat([(40 * frequencies).cos(), (40 * frequencies).sin()])
    torch.testing.assert_close(found[0, 16:], by_hand, atol=1e-4, rtol=1e-4)
    assert torch.equal(sinusoid(torch.tensor([0]), 4), torch.tensor([[1.0, 1.0, 0.0, 0.0]]))


def test_u03_statistics_are_no_parameters_and_travel_in_the_state():
    label = UnclipLabel(embed_dim=16)
    assert not list(label.parameters())
    assert set(label.state_dict()) == {"mean", "std"}


def test_u07_the_embedding_is_not_normalised():
    label, noise = UnclipLabel(embed_dim=16, noise_level="off"), embeddings(seed=1)
    z = embeddings()
    torch.testing.assert_close(label(3 * z)[:, :16], 3 * z)
    assert not torch.allclose(label(3 * z), label(z))
    assert torch.equal(label(z, noise=noise), label(z))


def test_u08_level_0_still_adds_a_spread_of_0064():
    normalizer, z = released(), embeddings(n=20_000)
    moved = like(normalizer, noise_level=0)(z, generator=torch.Generator().manual_seed(0))[:, :16] - z
    torch.testing.assert_close(moved.std(0), 0.0064 * normalizer.std.detach()[0], rtol=0.03, atol=0)
    off, told = like(normalizer, noise_level="off")(z), like(normalizer, noise_level=0)(z)
    assert torch.equal(off[:, 16:], told[:, 16:])
    assert torch.equal(off[:, :16], z)


def test_uniform_levels_are_drawn_per_sample_before_the_noise():
    label, z = UnclipLabel(embed_dim=16, noise_level="uniform"), embeddings()
    found = label(z, generator=torch.Generator().manual_seed(4))
    g = torch.Generator().manual_seed(4)
    level = torch.randint(0, 1000, (5,), generator=g)
    torch.testing.assert_close(found, label(z, level=level, noise=torch.randn(5, 16, generator=g)))
    many = label.draw(20_000, torch.device("cpu"))
    assert (int(many.min()), int(many.max())) == (0, LEVELS - 1)
    assert many.float().mean() == pytest.approx(499.5, abs=10)


def test_noise_at_the_last_level_leaves_nothing_of_the_embedding():
    label, noise = like(released(), noise_level=999), embeddings(seed=1)
    torch.testing.assert_close(
        label(embeddings(), noise=noise), label(embeddings(seed=2), noise=noise), atol=1e-2, rtol=0
    )


def test_gradient_reaches_the_embedding_scaled_by_the_signal():
    label, z = UnclipLabel(embed_dim=16, noise_level=500), embeddings().requires_grad_()
    label(z).sum().backward()
    torch.testing.assert_close(z.grad, label.alphas[500].sqrt().expand(5, 16))


def test_statistics_are_those_of_all_batches_together():
    label, z = UnclipLabel(embed_dim=16), embeddings(n=50)
    label.estimate([z[:7], z[7:]])
    torch.testing.assert_close(label.mean, z.mean(0, keepdim=True))
    torch.testing.assert_close(label.std[0], z.std(0, unbiased=False), atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match="readable images"):
        label.estimate([z[:1]])


def test_the_head_is_registered_with_its_settings():
    registry = Registry.discover(allow=["diffusion"])
    label = registry.build("head", "diffusion/unclip-label", {"embed_dim": 8, "noise_level": "uniform"})
    assert isinstance(label, UnclipLabel)
    assert label.noise_level == "uniform"
    assert label(torch.zeros(2, 8)).shape == (2, 16)
    with pytest.raises(ClipgraftError, match="noise_level"):
        registry.build("head", "diffusion/unclip-label", {"embed_dim": 8, "noise_level": 1000})
    with pytest.raises(ValidationError):
        UnclipLabelConfig(embed_dim=8, noise_level="sometimes")
