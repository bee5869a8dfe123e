"""Stable Diffusion's parts in miniature, with random weights, in the files that diffusers writes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from clipgraft.encoders.base import Preprocess
from clipgraft.errors import InputError
from clipgraft_diffusion.generator import forget
from clipgraft_diffusion.prompt import CrossCondition
from clipgraft_diffusion.unet import (
    autoencoder_pixels,
    clip_pixels,
    diffusion_problems,
    open_stable_diffusion,
)

NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}


def problems(where, *, size=64, tokens=None, **noise):
    return diffusion_problems(str(where), size=size, noise=NOISE | noise, tokens=tokens)


@pytest.fixture(scope="module")
def critic(tiny_diffusion):
    return open_stable_diffusion(str(tiny_diffusion), prompt="a photo of a .")


def test_parts_open_from_a_directory_and_the_prompt_is_encoded_once(tiny_diffusion, critic):
    from transformers import CLIPTextModel, CLIPTokenizer

    assert problems(tiny_diffusion) == []
    tokenizer = CLIPTokenizer.from_pretrained(tiny_diffusion / "tokenizer")
    ids = tokenizer("a photo of a .", padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert ids.shape == (1, 77)
    text = CLIPTextModel.from_pretrained(tiny_diffusion / "text_encoder").eval()
    torch.testing.assert_close(critic.prompt, text(ids).last_hidden_state.detach())
    assert critic.width == 16
    assert not [name for name, _ in critic.named_modules() if "text" in name]


def test_d06_latent_is_the_scaled_mean_and_d15_an_eighth_of_the_side(critic):
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    x0 = critic.latents(pixels)
    assert x0.shape == (2, 4, 8, 8)
    assert torch.equal(x0, critic.latents(pixels))
    torch.testing.assert_close(x0, 0.18215 * critic.vae.encode(2 * pixels - 1).latent_dist.mean)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(critic.latents(pixels), x0)


def test_d16_the_official_range_is_squeezed():
    black, white = (autoencoder_pixels(torch.full((1, 3, 1, 1), v), compat="official").flatten() for v in (0.0, 1.0))
    torch.testing.assert_close(black, torch.tensor([-0.85, -0.87, -0.85]), atol=0.01, rtol=0)
    torch.testing.assert_close(white, torch.tensor([0.85, 0.84, 0.78]), atol=0.01, rtol=0)
    torch.testing.assert_close((white - black) / 2, torch.tensor([0.852, 0.857, 0.816]), atol=1e-3, rtol=0)
    assert autoencoder_pixels(torch.tensor([0.0, 1.0]), compat="fixed").tolist() == [-1, 1]


def test_official_feeds_openais_statistics_to_every_backbone():
    siglip = Preprocess(size=(2, 2), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    pixels = torch.rand(1, 3, 2, 2)
    torch.testing.assert_close(clip_pixels(siglip, pixels, compat="fixed"), 2 * pixels - 1)
    red = clip_pixels(siglip, pixels, compat="official")[:, 0]
    torch.testing.assert_close(red, (pixels[:, 0] - 0.48145466) / 0.26862954)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_d03_the_frozen_unet_passes_gradient_to_the_condition(tiny_diffusion, critic, checkpointing):
    frozen = open_stable_diffusion(str(tiny_diffusion), prompt="a photo of a .", checkpointing=checkpointing)
    g = torch.Generator().manual_seed(0)
    x_t, condition = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 5, 16, generator=g, requires_grad=True)
    (found,) = torch.autograd.grad(frozen(x_t, torch.tensor([3, 900]), condition).square().mean(), condition)
    (plain,) = torch.autograd.grad(critic(x_t, torch.tensor([3, 900]), condition).square().mean(), condition)
    assert found.abs().sum() > 0
    torch.testing.assert_close(found, plain)
    assert not any(p.requires_grad or p.grad is not None for p in frozen.parameters())


@pytest.mark.parametrize(("combine", "shape"), [("add", (2, 77, 16)), ("mean-add", (2, 5, 16)), ("none", (2, 5, 16))])
def test_d01_d10_the_prompt_is_added_by_position_or_as_one_vector(critic, combine, shape):
    tokens = torch.randn(2, shape[1], 6, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    one = CrossCondition(6, critic.width, prompt=critic.prompt, combine=combine)
    other = CrossCondition(6, critic.width, prompt=critic.prompt.flip(1) + critic.prompt, combine=combine)
    other.project.load_state_dict(one.project.state_dict())
    told = one(tokens)
    assert told.shape == shape
    moved = (other(tokens) - told).detach()
    if combine == "none":
        assert not moved.any()
        torch.testing.assert_close(told, one.project(tokens))
    else:
        by_position = (moved - moved[:, :1]).abs().max() > 1e-3
        assert bool(by_position) == (combine == "add")
        states = critic.prompt if combine == "add" else critic.prompt.mean(1, keepdim=True)
        torch.testing.assert_close(told, one.project(tokens) + states)
    unit = CrossCondition(6, 4, prompt=None, unit=True)
    torch.testing.assert_close(unit(3 * tokens), unit.project(F.normalize(tokens, dim=-1)))


def changed(folder, part, **settings):
    file = folder / part
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_what_cannot_work_is_named(tiny_diffusion, tmp_path, monkeypatch):
    import shutil

    assert "multiple of 16" in problems(tiny_diffusion, size=72)[0]
    assert "77" in problems(tiny_diffusion, tokens=5)[0]
    assert problems(tiny_diffusion, tokens=77) == []
    assert "beta_end" in problems(tiny_diffusion, beta_end=0.02)[0]
    copy = tmp_path / "copy"
    shutil.copytree(tiny_diffusion, copy)
    changed(copy, "scheduler/scheduler_config.json", prediction_type="v_prediction")
    assert "v_prediction" in problems(copy)[0]
    with pytest.raises(InputError, match="v_prediction"):
        open_stable_diffusion(str(copy), prompt="")
    shutil.rmtree(copy / "vae")
    assert "vae" in problems(copy)[0]
    with pytest.raises(InputError, match="can't be opened"):
        open_stable_diffusion(str(tmp_path / "nowhere"), prompt="")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in problems("someone/no-such-model")[0]


def test_random_weights_are_other_weights_of_like_size(tiny_diffusion):
    critic = open_stable_diffusion(str(tiny_diffusion), prompt="")
    before = {name: p.clone() for name, p in critic.unet.named_parameters() if p.ndim > 1}
    forget(critic.unet)
    after = dict(critic.unet.named_parameters())
    assert all(not torch.equal(after[name], p) for name, p in before.items())
    assert all(0.5 < float(after[name].std() / p.std()) < 2 for name, p in before.items())


OPENERS = {
    "unet:open_stable_diffusion": "prompt='a'",
    "sds.told:open_told_diffusion": "",
    "unclip.model:open_unclip": "size=64, embed_dim=16, noise={}",
}


@pytest.mark.slow
@pytest.mark.parametrize("opener", OPENERS)
def test_parts_open_in_a_process_that_has_not_met_diffusers(opener, request):
    module, function = opener.split(":")
    where = request.getfixturevalue("tiny_unclip" if "unclip" in opener else "tiny_diffusion")
    code = (
        f"import sys; from clipgraft_diffusion.{module} import {function} as opened; "
        f"assert 'diffusers' not in sys.modules; opened(sys.argv[1], {OPENERS[opener]})"
    )
    done = subprocess.run([sys.executable, "-c", code, str(where)], capture_output=True, timeout=120, text=True)
    assert not done.returncode, done.stderr
