"""Facts of DIVA's official code that need the whole path: presets, condition, objective, open_clip's own model."""

from __future__ import annotations

from importlib import resources

import open_clip
import pytest
import torch
import yaml
from torch import nn

from clipgraft.checkpoint import write_export
from clipgraft.config.schema import TrainConfig
from clipgraft.testing.tiny import tiny_clip
from clipgraft.types import Batch, FeatureRequest, ImageFeatures
from clipgraft_diffusion.crops import CROP
from clipgraft_diffusion.diva.stage import Critique, DivaStage
from clipgraft_diffusion.eps import EpsObjective, NoiseSchedule
from clipgraft_diffusion.prompt import CrossCondition
from clipgraft_diffusion.recap import Recap, RecapConfig, local_projection
from clipgraft_diffusion.unet import open_stable_diffusion


@pytest.fixture(scope="module")
def critic(tiny_diffusion):
    return open_stable_diffusion(str(tiny_diffusion), prompt="a photo of a .")


@pytest.mark.parametrize(
    ("preset", "patches", "width", "length"),
    [
        ("openai-vit-l-14", 256, 768, 77),
        ("openai-vit-l-14-336", 576, 768, 77),
        ("metaclip-l-14", 256, 768, 257),
        ("metaclip-h-14", 256, 1024, 257),
        ("dfn-h-14", 256, 1024, 257),
        ("dfn-h-14-378", 729, 1024, 365),
        ("siglip-so400m-224", 256, 1152, 43),
        ("siglip-so400m-384", 729, 1152, 73),
    ],
)
def test_d01_condition_of_every_preset(preset, patches, width, length):
    """As many tokens as the official code's table has, in the 1,024 channels of Stable Diffusion 2.1."""
    settings = yaml.safe_load((resources.files("clipgraft_diffusion.recipes") / f"diva-{preset}.yaml").read_text())
    g = torch.Generator().manual_seed(0)
    prompt, tokens = torch.randn(1, 77, 1024, generator=g), torch.randn(2, patches, width, generator=g)
    condition = CrossCondition(width, 1024, prompt=prompt, combine=settings["condition"]["combine"])
    seen = RecapConfig(**settings["recap"]).build()(ImageFeatures(torch.randn(2, width, generator=g), tokens=tokens))
    told = condition(seen)
    assert told.shape == (2, length, 1024)
    assert (condition.project.in_features, condition.project.out_features) == (width, 1024)
    states = prompt if length == 77 else prompt.mean(1, keepdim=True)
    torch.testing.assert_close(told, condition.project(seen) + states)


def stage_and_batch(critic):
    encoder, base = tiny_clip().eval(), tiny_clip().eval()
    torch.manual_seed(0)
    condition = CrossCondition(encoder.image.embed_dim, critic.width, prompt=critic.prompt, combine="add")
    critique = Critique(Recap(kind="random", k=76), condition, EpsObjective(NoiseSchedule(), critic))
    train = TrainConfig(steps=2, batch_size=3, lr=1e-3)
    stage = DivaStage("clip", train=train, source=(), encoder=encoder, base=base, critique=critique)
    g = torch.Generator().manual_seed(1)
    crops = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=g)
    return stage, Batch(torch.rand(3, 3, 32, 32, generator=g), ["a", "b", "c"], extra={CROP: crops})


def step(stage, batch):
    torch.manual_seed(0)
    stage.zero_grad()
    loss = stage(batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in stage.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("classes", [1, 2])
def test_d04_the_weight_of_a_single_class_is_one_so_its_layer_is_left_out(critic, classes):
    """The official code weighs prompts by softmax(final_fc(...)); with one prompt that is 1, and nothing is learnt."""
    stage, batch = stage_and_batch(critic)
    loss, plain = step(stage, batch)
    assert not any("final_fc" in name for name, _ in stage.named_parameters())
    condition = stage.condition
    final_fc = nn.Linear(condition.project.in_features, classes)
    prompts = torch.cat([condition.prompt, condition.prompt.flip(1)])[:classes]  # (classes, 77, width)

    def weighed(tokens):
        share = final_fc(tokens[:, 0]).softmax(-1)  # (B, classes)
        return condition.project(tokens) + (share[..., None, None] * prompts).sum(1)

    condition.forward = weighed
    official_loss, official = step(stage, batch)
    if classes == 1:
        assert torch.equal(official_loss, loss)
        assert all(torch.equal(official[name], gradient) for name, gradient in plain.items())
        assert not final_fc.weight.grad.any()
        assert not final_fc.bias.grad.any()
    else:  # the layer is really asked: with a choice it would learn
        assert not torch.equal(official_loss, loss)
        assert final_fc.weight.grad.any()


def test_d07_the_first_token_is_what_open_clip_encodes(tmp_path):
    clip = tiny_clip(seed=3).eval()
    write_export(clip, tmp_path / "clip")
    stock, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'clip'}")
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features = clip.image(pixels, FeatureRequest(tokens=True))
    told = CrossCondition(16, 16, prompt=None)
    nn.init.eye_(told.project.weight)
    nn.init.zeros_(told.project.bias)
    seen = told(Recap(kind="all")(features, project=local_projection(clip.image)))
    assert seen.shape == (3, 17, 16)
    with torch.no_grad():
        assert (seen[:, 0] - stock.eval().encode_image(pixels)).abs().max() < 1e-6
    assert (seen[:, 1:] - seen[:, :1]).abs().amax((1, 2)).min() > 1e-3


def test_d15_latent_of_a_crop_of_512_px(critic):
    assert critic.latents(torch.rand(1, 3, 512, 512)).shape == (1, 4, 64, 64)
