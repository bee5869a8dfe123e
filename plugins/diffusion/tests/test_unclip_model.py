"""A Stable unCLIP in miniature, with random weights, in the files that diffusers writes."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch

from clipgraft.errors import InputError
from clipgraft_diffusion.eps import EpsObjective, NoiseSchedule
from clipgraft_diffusion.unclip.model import open_unclip, unclip_problems
from clipgraft_diffusion.weights import Weights

NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}


def problems(where, *, size=64, embed_dim=16, **noise):
    return unclip_problems(str(where), size=size, embed_dim=embed_dim, noise=NOISE | noise)


def opened(where, **more):
    return open_unclip(str(where), **{"size": 64, "embed_dim": 16, "noise": NOISE, **more})


@pytest.fixture(scope="module")
def model(tiny_unclip):
    return opened(tiny_unclip)


@pytest.fixture
def changed(tiny_unclip, tmp_path):
    """A copy with other settings in one of its JSON files."""

    def change(part, **settings):
        copy = tmp_path / "copy"
        if not copy.exists():
            shutil.copytree(tiny_unclip, copy)
        file = next((copy / part).glob("*config.json"))
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))
        return copy

    return change


def draw(seed=0, n=2):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, 8, 8, generator=g), torch.randn(n, 4, 8, 8, generator=g), torch.tensor([3, 900][:n])


def test_parts_open_with_the_released_statistics_and_the_empty_prompt(tiny_unclip, model):
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
    from transformers import CLIPTextModel, CLIPTokenizer

    assert problems(tiny_unclip) == []
    normalizer = StableUnCLIPImageNormalizer.from_pretrained(tiny_unclip / "image_normalizer")
    assert torch.equal(model.label.mean, normalizer.mean)
    assert torch.equal(model.label.std, normalizer.std)
    assert model.label.noise_level == 0
    ids = CLIPTokenizer.from_pretrained(tiny_unclip / "tokenizer")(
        "", padding="max_length", max_length=77, return_tensors="pt"
    )
    text = CLIPTextModel.from_pretrained(tiny_unclip / "text_encoder").eval()
    torch.testing.assert_close(model.decoder.parts.prompt, text(ids.input_ids).last_hidden_state.detach())
    assert not [name for name, _ in model.decoder.named_modules() if "text" in name]
    assert (model.decoder.width, model.target) == (32, "velocity")


def test_the_unet_gets_the_prompt_and_the_label_and_the_rest_is_stable_diffusion(model):
    x_t, _, t = draw()
    labels = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    prompt = model.decoder.parts.prompt
    wanted = model.decoder.parts.unet(x_t, t, encoder_hidden_states=prompt.repeat(2, 1, 1), class_labels=labels).sample
    assert torch.equal(model.decoder(x_t, t, labels), wanted)
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mean = model.decoder.parts.vae.encode(2 * pixels - 1).latent_dist.mean
    torch.testing.assert_close(model.decoder.latents(pixels), 0.18215 * mean)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_u02_u03_gradient_reaches_the_embedding_and_no_weight(tiny_unclip, checkpointing):
    found = opened(tiny_unclip, checkpointing=checkpointing)
    z = torch.randn(2, 16, generator=torch.Generator().manual_seed(2)).requires_grad_()
    objective = EpsObjective(NoiseSchedule(), found.decoder, target=found.target)
    x0, noise, t = draw()
    objective(x0, found.label(z), t, noise).sum().backward()
    assert bool((z.grad.abs().sum(1) > 0).all())
    weights = [*found.decoder.parameters(), *found.label.parameters()]
    assert not any(p.requires_grad or p.grad is not None for p in weights)


def test_u11_terms_of_the_loss_follow_a_permutation_of_the_batch(model):
    x0, noise, t = draw()
    labels = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    objective = EpsObjective(NoiseSchedule(), model.decoder, target="velocity")
    losses = objective(x0, labels, t, noise)
    torch.testing.assert_close(objective(x0.flip(0), labels.flip(0), t.flip(0), noise.flip(0)), losses.flip(0))


def test_u12_another_prompt_changes_the_loss_but_not_where_the_gradient_goes(tiny_unclip, model):
    other = opened(tiny_unclip, prompt="a photo of a cat")
    x0, noise, t = draw()
    found = []
    for each in (model, other):
        labels = torch.full((2, 32), 0.3, requires_grad=True)
        losses = EpsObjective(NoiseSchedule(), each.decoder, target="velocity")(x0, labels, t, noise)
        found.append((losses, torch.autograd.grad(losses.sum(), labels)[0]))
    assert not torch.allclose(found[0][0], found[1][0], atol=0, rtol=1e-6)
    assert torch.equal(found[0][1] != 0, found[1][1] != 0)


def test_u13_without_the_class_embedding_the_embedding_gets_no_gradient(tiny_unclip):
    found = opened(tiny_unclip)
    with torch.no_grad():
        for p in found.decoder.parts.unet.class_embedding.parameters():
            p.zero_()
    z = torch.randn(2, 16, requires_grad=True)
    x0, noise, t = draw()
    EpsObjective(NoiseSchedule(), found.decoder)(x0, found.label(z), t, noise).sum().backward()
    assert not z.grad.any()


def test_a_model_that_predicts_the_noise_is_read_as_such(changed):
    copy = changed("scheduler", prediction_type="epsilon")
    assert problems(copy) == []
    assert opened(copy).target == "noise"


@pytest.mark.parametrize(
    ("part", "settings", "said"),
    [
        ("unet", {"class_embed_type": None, "projection_class_embeddings_input_dim": None}, "takes no image embedding"),
        ("unet", {"projection_class_embeddings_input_dim": 1536}, "width 768.*this tower's have 16.*kind train"),
        ("unet", {"cross_attention_dim": 24}, "cross-attention of width 24"),
        ("unet", {"in_channels": 9}, "takes 9 channels"),
        ("image_normalizer", {"embedding_dim": 768}, "768 means"),
        ("image_noising_scheduler", {"beta_schedule": "linear"}, "noises embeddings with beta_schedule linear"),
        ("image_noising_scheduler", {"num_train_timesteps": 50}, "num_train_timesteps 50"),
        ("scheduler", {"prediction_type": "sample"}, "predicts sample"),
        ("scheduler", {"beta_end": 0.02}, "beta_end 0.02"),
        ("scheduler", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr True"),
    ],
)
def test_what_does_not_fit_is_one_line(changed, part, settings, said):
    import re

    found = problems(changed(part, **settings))
    assert len(found) == 1
    assert re.search(said, found[0])
    assert "\n" not in found[0]


def test_an_unfitting_model_from_the_hub_is_refused_when_it_is_opened(tiny_unclip):
    with pytest.raises(InputError, match="this tower's have 24"):
        opened(tiny_unclip, embed_dim=24)


def test_missing_parts_sizes_and_weights(tiny_unclip, tiny_diffusion, tmp_path):
    assert "multiple of 16" in problems(tiny_unclip, size=72)[0]
    assert "image normalizer" in problems(tiny_diffusion)[0]
    copy = tmp_path / "copy"
    shutil.copytree(tiny_unclip, copy)
    (copy / "unet" / "diffusion_pytorch_model.safetensors").rename(copy / "weights")
    settings = {"size": 64, "embed_dim": 16, "noise": NOISE}
    found = unclip_problems(str(copy), **settings, weights={"unet": Weights()})
    assert "no diffusion_pytorch_model.safetensors" in found[0]
    drawn = {part: Weights(seed=0) for part in ("unet", "vae", "text_encoder", "image_normalizer")}
    assert unclip_problems(str(copy), **settings, weights=drawn) == []
    one, again = opened(copy, weights=drawn), opened(copy, weights=drawn)
    x_t, _, t = draw()
    assert torch.equal(one.decoder(x_t, t, torch.ones(2, 32)), again.decoder(x_t, t, torch.ones(2, 32)))


def test_a_pinned_normaliser_is_compared(tiny_unclip):
    file = tiny_unclip / "image_normalizer" / "diffusion_pytorch_model.safetensors"
    right = hashlib.sha256(file.read_bytes()).hexdigest()
    settings = {"size": 64, "embed_dim": 16, "noise": NOISE}
    assert unclip_problems(str(tiny_unclip), **settings, weights={"image_normalizer": Weights(sha256=right)}) == []
    wrong = unclip_problems(str(tiny_unclip), **settings, weights={"image_normalizer": Weights(sha256="0" * 64)})
    assert right in wrong[0]
