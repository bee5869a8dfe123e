"""Activations that are computed again: fewer of them are kept, and no gradient changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clipgraft.config.schema import GraftNode
from clipgraft.encoders import apply_grafts
from clipgraft.errors import InputError
from clipgraft.registry import Registry
from clipgraft.testing.tiny import tiny_clip
from clipgraft.types import FeatureRequest
from clipgraft_diffusion.condition import Condition
from clipgraft_diffusion.denoiser import FluxDenoiser
from clipgraft_diffusion.perceiver import Perceiver
from clipgraft_diffusion.recompute import recompute_blocks
from clipgraft_diffusion.unet import open_stable_diffusion


def measured(run, wanted):
    """Loss, gradients and bytes that autograd keeps."""
    kept = [0]

    def pack(tensor):
        kept[0] += tensor.nbytes
        return tensor

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run()
    return loss.detach(), torch.autograd.grad(loss, wanted), kept[0]


def tower(kind, *, lora):
    encoder = tiny_clip(kind=kind, depth=3)
    if lora:
        encoder.requires_grad_(False)
        node = GraftNode(
            use="core/lora", towers=("image",), rank=4, alpha=4, dropout=0.5, targets=("q", "k", "v", "o", "mlp")
        )
        encoder = apply_grafts(encoder, (node,), registry=Registry.discover(allow=[]))
        g = torch.Generator().manual_seed(0)
        for p in encoder.image.parameters():
            if p.requires_grad:
                nn.init.normal_(p, std=0.1, generator=g)
    encoder.image.train()
    return encoder.image


@pytest.mark.parametrize("kind", ["vit", "siglip-timm"])
@pytest.mark.parametrize("lora", [False, True])
def test_a_towers_gradients_are_equal_dropout_and_adapters_included(kind, lora):
    pixels, found = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), []
    for recomputed in (False, True):
        image = tower(kind, lora=lora)
        if recomputed:
            recompute_blocks(image)

        def run(image=image):
            features = image(pixels, FeatureRequest(tokens=True))
            return features.pooled.square().sum() + features.tokens.square().sum()

        found.append(measured(run, [p for p in image.parameters() if p.requires_grad]))
    (loss, grads, kept), (other_loss, other_grads, other_kept) = found
    assert torch.equal(loss, other_loss)
    assert all(torch.equal(a, b) for a, b in zip(grads, other_grads, strict=True))
    assert other_kept < 0.4 * kept


def test_an_evaluation_and_the_weights_names_are_untouched():
    image, plain = tower("vit", lora=False), tower("vit", lora=False)
    recompute_blocks(image)
    assert image.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        pixels = torch.rand(2, 3, 32, 32)
        assert torch.equal(image(pixels).pooled, plain(pixels).pooled)


def test_a_convolutional_tower_is_refused():
    class Convolutions(nn.Module):
        tower = nn.Sequential(nn.Conv2d(3, 3, 1))

    with pytest.raises(InputError, match="choose a ViT"):
        recompute_blocks(Convolutions())


def test_the_frozen_unet_keeps_less_when_only_the_condition_needs_gradient(tiny_diffusion):
    g = torch.Generator().manual_seed(0)
    x_t, condition = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 5, 16, generator=g, requires_grad=True)
    found = []
    for checkpointing in (False, True):
        critic = open_stable_diffusion(str(tiny_diffusion), prompt="", checkpointing=checkpointing)
        t = torch.tensor([3, 900])
        found.append(measured(lambda c=critic, t=t: c(x_t, t, condition).square().sum(), [condition]))
    torch.testing.assert_close(found[1][:2], found[0][:2], rtol=1e-6, atol=1e-7)
    assert found[1][2] < 0.6 * found[0][2]


def test_the_frozen_flux_blocks_keep_less_when_only_the_condition_needs_gradient():
    g = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, 9, 8, generator=g)
    vec, txt = (torch.randn(2, 16, generator=g, requires_grad=True) for _ in range(2))
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        sizes = {"width": 32, "heads": 2, "depth": 2, "single_depth": 2, "vec_dim": 16, "txt_dim": 16}
        denoiser = FluxDenoiser(8, (3, 3), checkpointing=checkpointing, **sizes).requires_grad_(False).eval()
        t = torch.tensor([0.3, 0.9])
        run = lambda d=denoiser, t=t: d(x_t, t, Condition(vec, txt[:, None])).square().sum()  # noqa: E731
        found.append(measured(run, [vec, txt]))
    torch.testing.assert_close(found[1][:2], found[0][:2], rtol=1e-6, atol=1e-7)
    assert found[1][2] < 0.6 * found[0][2]


def test_the_frozen_perceiver_keeps_less_when_only_the_condition_needs_gradient():
    g = torch.Generator().manual_seed(0)
    told = torch.randn(2, 32, generator=g, requires_grad=True)
    codes, places, found = torch.randint(0, 7, (2, 9), generator=g), torch.arange(9).expand(2, 9), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        perceiver = Perceiver(torch.randn(7, 6), (3, 3), width=32, heads=2, layers=4, checkpointing=checkpointing)
        perceiver.requires_grad_(False).eval()

        def run(p=perceiver):
            return p(p.embed(codes), places[:, :4], places[:, 4:], told).square().sum()

        found.append(measured(run, [told]))
    torch.testing.assert_close(found[1][:2], found[0][:2], rtol=1e-6, atol=1e-7)
    assert found[1][2] < 0.6 * found[0][2]
