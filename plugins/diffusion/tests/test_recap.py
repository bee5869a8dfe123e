"""The recap of every backbone of the paper's table, on random features of the real shapes and on tiny towers."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from clipgraft.errors import InputError
from clipgraft.registry import Registry
from clipgraft.testing.tiny import tiny_clip
from clipgraft.types import FeatureRequest, ImageFeatures
from clipgraft_diffusion.recap import Recap, RecapConfig, local_projection

TOKENS = FeatureRequest(tokens=True)
RANDOM = {"kind": "random", "k": 76}


def features(patches, *, width=12, dim=12, size=2):
    g = torch.Generator().manual_seed(patches)
    return ImageFeatures(torch.randn(size, dim, generator=g), tokens=torch.randn(size, patches, width, generator=g))


@pytest.mark.parametrize(
    ("settings", "patches", "tokens"),
    [
        (RANDOM, 256, 77),  # OpenAI L/14 at 224 px
        (RANDOM, 576, 77),  # OpenAI L/14 at 336 px
        ({"kind": "all"}, 256, 257),  # MetaCLIP L/14 and H/14, DFN H/14 at 224 px
        ({"kind": "random", "ratio": 0.5}, 729, 365),  # DFN H/14 at 378 px
        ({"kind": "average", "window": 6}, 256, 43),  # SigLIP at 224 px
        ({"kind": "average", "window": 10}, 729, 73),  # SigLIP at 384 px
        ({"kind": "cls"}, 256, 1),
    ],
)
def test_d01_counts_of_the_table(settings, patches, tokens):
    recap = RecapConfig(**settings).build()
    assert recap(features(patches)).shape == (2, tokens, 12)
    assert recap.count(patches) == tokens - 1


@pytest.mark.parametrize("kind", ["vit", "siglip-timm"])
def test_d07_all_tokens_are_projected_as_the_tower_does_and_the_first_is_the_embedding(kind):
    clip = tiny_clip(kind=kind).eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = clip.image(x, TOKENS)
    told = Recap(kind="all")(found, project=local_projection(clip.image))
    assert told.shape == (2, 17, clip.image.embed_dim)
    torch.testing.assert_close(told[:, 0], clip.image(x).pooled, atol=1e-6, rtol=0)
    tower = clip.image.tower
    if kind == "siglip-timm":  # the trunk's last norm and nothing else
        torch.testing.assert_close(told[:, 1:], tower.trunk.forward_features(x))
    else:  # by hand: the blocks' output, last norm, projection
        (_, taken) = tower.transformer.forward_intermediates(tower._embeds(x), indices=[1])
        torch.testing.assert_close(told[:, 1:], tower.ln_post(taken[0])[:, 1:] @ tower.proj, atol=1e-6, rtol=1e-6)


def test_the_projection_that_is_trained_is_the_one_in_use():
    clip = tiny_clip().eval()
    project, tokens = local_projection(clip.image), torch.randn(1, 3, 32)
    before = project(tokens)
    with torch.no_grad():
        clip.image.tower.proj.mul_(2)
    torch.testing.assert_close(project(tokens), 2 * before)
    project(tokens).sum().backward()
    assert clip.image.tower.proj.grad is not None


def test_d08_patches_are_drawn_with_replacement_for_each_image_its_own_and_follow_the_generator():
    f = ImageFeatures(torch.zeros(2, 1), tokens=torch.arange(256.0).expand(2, 256)[..., None])
    recap, g = Recap(**RANDOM), torch.Generator()
    one, same, other = (recap(f, generator=g.manual_seed(seed))[..., 0] for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one[0, 1:].unique().numel() < 76
    assert not torch.equal(one[0], one[1])
    torch.manual_seed(3)
    drawn = recap(f)[..., 0]
    torch.manual_seed(3)
    assert torch.equal(drawn[:, 1:], torch.randint(0, 256, (2, 76)).float())  # the official draw
    alone = Recap(kind="random", k=256, replacement=False)(f, generator=g)[0, 1:, 0]
    assert torch.equal(alone.sort().values, torch.arange(256.0))


def test_d09_windows_average_the_raster_and_drop_the_tail():
    f, recap = features(256), Recap(kind="average", window=6)
    told = recap(f)
    torch.testing.assert_close(told[:, 1:], f.tokens[:, :252].unflatten(1, (42, 6)).mean(2))
    f.tokens[:, 252:] += 1
    assert torch.equal(recap(f), told)
    f.tokens[:, 251] += 1
    assert not torch.equal(recap(f), told)


def test_gradient_reaches_global_and_drawn_tokens():
    f = features(16)
    pooled, tokens = f.pooled.requires_grad_(), f.tokens.requires_grad_()
    Recap(kind="random", k=4)(f, generator=torch.Generator().manual_seed(0)).sum().backward()
    assert pooled.grad.eq(1).all()
    assert tokens.grad.sum((1, 2)).eq(4 * 12).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "random"},
        {"kind": "random", "k": 3, "ratio": 0.5},
        {"kind": "all", "k": 3},
        {"kind": "average"},
        {"kind": "cls", "window": 2},
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings):
    with pytest.raises(ValidationError, match="takes"):
        RecapConfig(**settings)


def test_what_does_not_suit_a_tower_is_refused():
    with pytest.raises(InputError, match="window 20"):
        Recap(kind="average", window=20)(features(16))
    with pytest.raises(InputError, match="k 20"):
        Recap(kind="random", k=20, replacement=False).count(16)
    with pytest.raises(InputError, match="width 8"):
        Recap(kind="all")(features(16, width=8))
    with pytest.raises(ValueError, match="FeatureRequest"):
        Recap(kind="all")(ImageFeatures(torch.zeros(1, 2)))


def test_opens_by_name():
    built = Registry.discover(allow=["diffusion"]).build("head", "diffusion/recap", {"kind": "random", "ratio": 0.25})
    assert built(features(16)).shape == (2, 5, 12)
