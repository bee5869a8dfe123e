"""Facts of GenHancer's official code that need the whole path: shapes at full size, the loss of a stage, the tower."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F

from clipgraft.config.schema import TrainConfig
from clipgraft.testing.tiny import tiny_clip
from clipgraft.types import Batch
from clipgraft_diffusion.condition import GlobalCondition
from clipgraft_diffusion.denoiser import FluxDenoiser, grid_ids
from clipgraft_diffusion.feedback import Feedback
from clipgraft_diffusion.flow import LogitNormal
from clipgraft_diffusion.genhancer.stages import ClipStage, GeneratorStage
from clipgraft_diffusion.latent import TokenLatent, VaeLatent
from clipgraft_diffusion.target import Target

TRAIN = TrainConfig(steps=2, batch_size=4, lr=1e-3)


def batch(n=4, seed=0):
    pixels = torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return Batch(pixels, [str(i) for i in range(n)])


def parts(kind="vit"):
    encoder, base = tiny_clip(kind=kind).eval(), tiny_clip(kind=kind).eval()
    latent = TokenLatent(None, like=base.image, preprocess=base.preprocess)
    torch.manual_seed(0)
    denoiser = FluxDenoiser(
        latent.channels, latent.grid, width=32, heads=2, depth=1, single_depth=1, vec_dim=16, txt_dim=16
    )
    condition = GlobalCondition(encoder.image.embed_dim, vec_dim=16, txt_dim=16)
    return encoder, Target(base, latent), Feedback(condition, denoiser, times=LogitNormal(0.8))


def clip_stage(kind="vit"):
    encoder, target, feedback = parts(kind)
    encoder.requires_grad_(False)
    encoder.image.requires_grad_(True)
    return ClipStage(
        "clip",
        train=TRAIN,
        source=(),
        encoder=encoder,
        target=target,
        feedback=feedback,
        anchor=None,
        held_out=batch(6).pixels,
    )


def generator_stage():
    _, target, feedback = parts()
    return GeneratorStage(
        "generator", train=TRAIN, source=(), target=target, feedback=feedback, held_out=batch(6).pixels
    )


@pytest.mark.parametrize(("side", "tokens"), [(224, 196), (336, 441), (384, 576)])
def test_g02_g03_shapes_at_full_size(side, tokens):
    """Image tokens (B, L, 64), their ids (L, 3), and the condition in the official widths."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
    )
    latent = VaeLatent(vae, size=(side, side))
    with torch.no_grad():
        assert latent(torch.rand(1, 3, side, side)).shape == (1, tokens, 64)
    assert latent.channels == 64
    assert grid_ids(latent.grid, compat="fixed").shape == (tokens, 3)
    told = GlobalCondition(1024)(torch.randn(2, 1024))
    assert (told.vec.shape, told.txt.shape) == ((2, 768), (2, 1, 4096))


@pytest.mark.parametrize("stage", [generator_stage, clip_stage])
def test_g09_a_stages_loss_is_the_error_of_noise_minus_data_in_the_official_order_of_draws(stage):
    stage, b = stage(), batch()
    stage.train()
    torch.manual_seed(7)
    found = stage(b).loss
    seen = stage.target(b)
    z = seen.z if isinstance(stage, GeneratorStage) else stage.encoder.image(2 * b.pixels - 1).pooled
    torch.manual_seed(7)
    t = torch.sigmoid(0.8 * torch.randn(4))
    noise = torch.randn(seen.x1.shape)
    x_t = (1 - t)[:, None, None] * seen.x1 + t[:, None, None] * noise
    predicted = stage.feedback.denoiser(x_t, t, stage.feedback.condition(z))
    torch.testing.assert_close(found, F.mse_loss(predicted, noise - seen.x1))
    with torch.autocast("cpu", torch.bfloat16):
        assert stage(b).loss.dtype == torch.float32


class Told:
    """What the generator is told of a batch while a block of the tower lies about some tokens."""

    def __init__(self, stage):
        self.stage, self.heard = stage, []
        stage.feedback.condition.register_forward_hook(lambda _, args, out: self.heard.append(out))

    def __call__(self, change=None, *, block=-1):
        """``change(x)`` of a block's output (B, 1 + N, W)."""
        handle = None
        if change is not None:
            handle = self.stage.encoder.image.tower.transformer.resblocks[block].register_forward_hook(
                lambda _, args, out: change(out)
            )
        torch.manual_seed(0)
        with torch.no_grad():
            self.stage(batch())
        if handle is not None:
            handle.remove()
        return self.heard[-1]


def other(x, *, patches):
    """x (B, 1 + N, W) with noise in place of the patch tokens, or of the class token."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    assert x.shape[1:] == (17, 32)
    return torch.cat([x[:, :1], noise[:, 1:]] if patches else [noise[:, :1], x[:, 1:]], 1)


def test_g11_final_patch_tokens_reach_the_condition_only_through_the_pooled_embedding():
    told = Told(clip_stage().eval())
    plain, again = told(), told()
    assert torch.equal(plain.vec, again.vec)
    lied = told(lambda x: other(x, patches=True))
    assert torch.equal(plain.vec, lied.vec)
    assert torch.equal(plain.txt, lied.txt)
    for change, block in ((False, -1), (True, 0)):  # the class token matters; so do patches that a block still reads
        moved = told(lambda x, patches=change: other(x, patches=patches), block=block)
        assert (moved.vec - plain.vec).abs().max() > 1e-3
        assert (moved.txt - plain.txt).abs().max() > 1e-3
