import pytest
import torch

from clipgraft.errors import InputError
from clipgraft.types import ImageFeatures
from clipgraft_diffusion.latent import Standardise, VaeLatent, open_vae, pack, packed_grid, unpack, vae_problem


@pytest.fixture(scope="module")
def vae():
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def test_g13_unpack_inverts_pack():
    y = torch.randn(2, 16, 6, 8)
    tokens = pack(y)
    assert tokens.shape == (2, 12, 64)
    assert torch.equal(unpack(tokens, (3, 4)), y)


def test_pack_orders_channels_as_channel_row_column():
    y = torch.arange(2 * 4 * 4).reshape(1, 2, 4, 4).float()
    first = pack(y)[0, 0]
    assert first.tolist() == [y[0, c, r, k].item() for c in range(2) for r in range(2) for k in range(2)]
    assert pack(y)[0, 1, 0] == y[0, 0, 0, 2]  # tokens run along the row


@pytest.mark.parametrize(("pixels", "tokens"), [(224, 196), (336, 441), (384, 576)])
def test_g03_token_count(pixels, tokens):
    h, w = packed_grid((pixels, pixels))
    assert h * w == tokens


@pytest.mark.parametrize("pixels", [378, 230])
def test_g03_sizes_that_are_no_multiple_of_16_are_refused(pixels):
    with pytest.raises(InputError, match="multiples of 16"):
        packed_grid((pixels, pixels))


def test_g12_vae_latent_is_sampled_scaled_shifted_and_packed(vae):
    latent, pixels = VaeLatent(vae, size=(32, 48)), torch.rand(2, 3, 32, 48)
    assert (latent.channels, latent.grid) == (64, (2, 3))
    first, second = latent(pixels), latent(pixels)
    assert first.shape == (2, 6, 64)
    assert (first - second).abs().max() > 1e-3
    assert not first.requires_grad
    g = torch.Generator()
    again = [latent(pixels, g.manual_seed(5)) for _ in range(2)]
    assert torch.equal(*again)
    posterior = vae.encode(2 * pixels - 1).latent_dist
    by_hand = 0.3611 * (
        posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=g.manual_seed(5)) - 0.1159
    )
    torch.testing.assert_close(unpack(again[0], (2, 3)), by_hand, atol=1e-5, rtol=1e-5)


def test_vae_runs_in_fp32_under_autocast(vae):
    latent, pixels, g = VaeLatent(vae, size=(32, 32)), torch.rand(1, 3, 32, 32), torch.Generator()
    exact = latent(pixels, g.manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(latent(pixels, g.manual_seed(0)), exact)


def test_vae_opens_from_a_directory_with_or_without_the_subfolder(vae, tmp_path):
    vae.save_pretrained(tmp_path / "repo" / "vae")
    for where in (tmp_path / "repo", tmp_path / "repo" / "vae"):
        opened = open_vae(str(where), "vae")
        assert all(torch.equal(a, b) for a, b in zip(opened.parameters(), vae.parameters(), strict=True))


def test_missing_vae_is_one_clear_line(tmp_path, monkeypatch):
    assert "config.json" in vae_problem(str(tmp_path), "vae")
    with pytest.raises(InputError, match="to tokens"):
        open_vae(str(tmp_path / "none"), None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in vae_problem("someone/no-such-autoencoder", "vae")


def test_statistics_match_the_whole_set_and_do_not_depend_on_batches():
    tokens = torch.randn(50, 4, 3, generator=torch.Generator().manual_seed(0)) * 2 + torch.arange(12).view(4, 3)
    parts = []
    for size in (50, 7):
        s = Standardise(4, 3)
        s.estimate(tokens.split(size))
        parts.append(s)
    torch.testing.assert_close(parts[0].mean, tokens.mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(parts[1].std, parts[0].std)
    out = parts[0](tokens)
    torch.testing.assert_close(out.mean(0), torch.zeros(4, 3), atol=1e-5, rtol=0)
    assert out.square().mean((0, 1)) == pytest.approx(torch.ones(3), abs=1e-3)


def test_no_images_no_statistics():
    with pytest.raises(InputError, match="no readable image"):
        Standardise(4, 3).estimate([])


def test_features_without_tokens_are_refused():
    with pytest.raises(ValueError, match="FeatureRequest"):
        ImageFeatures(torch.zeros(1, 2)).map()
