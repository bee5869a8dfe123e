"""The facts of the official code about what is trained, what is frozen, and what the loss is."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clipgraft.config.schema import TrainConfig
from clipgraft.data.base import Sample
from clipgraft.errors import InputError
from clipgraft.testing.tiny import tiny_clip
from clipgraft.types import Batch, FeatureRequest
from clipgraft_diffusion.anchor import Anchor
from clipgraft_diffusion.crops import CROP, Crops
from clipgraft_diffusion.diva.stage import Critique, DivaStage
from clipgraft_diffusion.eps import EpsObjective, NoiseSchedule
from clipgraft_diffusion.generator import FlowGenerator
from clipgraft_diffusion.prompt import CrossCondition, fit_projection
from clipgraft_diffusion.recap import Recap
from clipgraft_diffusion.remember import Remembered
from clipgraft_diffusion.unet import open_stable_diffusion

RECAPS = {"vit": Recap(kind="random", k=76), "siglip-timm": Recap(kind="average", window=6)}


class Noise:
    """Twelve noise images."""

    name, fingerprint, templates, attributes, classes = "noise", "noise", (), {}, ()

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Sample:
        g = torch.Generator().manual_seed(index)
        return Sample(f"noise-{index}", torch.randint(0, 256, (3, 80, 70), dtype=torch.uint8, generator=g))


def batch(n=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    crops = torch.randint(0, 256, (n, 3, 64, 64), dtype=torch.uint8, generator=g)
    return Batch(F.avg_pool2d(crops.float() / 255, 2), [str(i) for i in range(n)], extra={CROP: crops})


@pytest.fixture
def make(tiny_diffusion):
    def stage(kind="vit", *, compat="fixed", accumulate=1, **more):
        encoder, base = tiny_clip(kind=kind).eval(), tiny_clip(kind=kind).eval()
        critic = open_stable_diffusion(str(tiny_diffusion), prompt="a photo of a .", compat=compat)
        torch.manual_seed(0)
        combine = "add" if kind == "vit" else "mean-add"
        condition = CrossCondition(encoder.image.embed_dim, critic.width, prompt=critic.prompt, combine=combine)
        critique = Critique(RECAPS[kind], condition, EpsObjective(NoiseSchedule(), critic), compat=compat)
        train = TrainConfig(steps=2, batch_size=4, lr=1e-3, accumulate=accumulate)
        settings = {"critique": critique, "held_out": [batch(3, 1), batch(2, 2)], **more}
        return DivaStage("clip", train=train, source=Noise(), encoder=encoder, base=base, **settings)

    return stage


def everything(stage):
    """The stage's parameters by name, those of the frozen parts that are set aside too."""
    aside = {name: part for name, part in vars(stage).items() if isinstance(part, nn.Module)}
    assert aside
    found = {f"{name}.{k}": p for name, part in aside.items() for k, p in part.named_parameters()}
    return dict(stage.named_parameters()) | found


def gradients(stage):
    for p in everything(stage).values():
        p.grad = None
    torch.manual_seed(0)
    stage.train()
    stage(batch()).loss.backward()
    return {name: p.grad for name, p in everything(stage).items()}


@pytest.mark.parametrize("kind", ["vit", "siglip-timm"])
def test_d02_d03_gradient_reaches_the_whole_tower_and_the_projection_and_nothing_else(make, kind):
    grads = gradients(make(kind))
    with_grad = {name for name, g in grads.items() if g is not None and g.any()}
    wanted = {name for name in grads if name.startswith(("encoder.image.", "condition."))}
    assert wanted - with_grad <= {n for n in wanted if n.endswith("in_proj_bias") or ".kv.bias" in n or ".k.bias" in n}
    assert {name for name, g in grads.items() if g is not None} == wanted
    assert {name.split(".")[0] for name in grads.keys() - wanted} == {"encoder", "base", "objective"}
    assert {name.split(".")[2] for name in grads if name.startswith("objective.denoiser.")} >= {"unet", "vae"}


def test_frozen_parts_stay_in_eval_mode_and_out_of_the_checkpoint(make):
    stage = make()
    stage.train()
    assert stage.encoder.image.training
    assert not any(m.training for part in (stage.base, stage.objective, stage.encoder.text) for m in part.modules())
    assert not [k for k in stage.trained_state() if k.startswith(("base.", "objective.", "encoder.text."))]
    rates = {g["name"] for g in stage.param_groups()}
    assert rates == {"tower", "condition"}


@pytest.mark.parametrize("compat", ["fixed", "official"])
def test_d05_d11_loss_and_gradient_by_hand_in_the_official_order_of_draws(make, compat):
    stage = make(compat=compat, accumulate=5)
    found, b, c = gradients(stage), batch(), stage.critique
    critic = c.objective.denoiser
    stage.zero_grad()
    torch.manual_seed(0)
    x0, losses = critic.latents(b.extra[CROP].float() / 255), []
    official = compat == "official"
    stats = (
        ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)) if official else ((0.5,) * 3,) * 2
    )
    mean, std = (torch.tensor(s)[:, None, None] for s in stats)
    tower = stage.encoder.image.tower
    for _ in range(2):
        t, noise = torch.randint(0, 1000, (4,)), torch.randn(4, 4, 8, 8)
        x, _ = tower.transformer.forward_intermediates(tower._embeds((b.pixels - mean) / std), indices=[0])
        rows = torch.randint(0, 16, (4, 76))
        tokens = torch.cat([x[:, :1], x[:, 1:][torch.arange(4)[:, None], rows]], 1)
        condition = c.condition.project(tower.ln_post(tokens) @ tower.proj) + critic.prompt
        share = c.objective.schedule.alphas[t].view(4, 1, 1, 1)
        x_t = share.sqrt() * x0 + (1 - share).sqrt() * noise
        losses.append(F.mse_loss(critic(x_t, t, condition), noise))
    (5 * losses[0] + losses[1] if official else (losses[0] + losses[1]) / 2).backward()
    for name, p in stage.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, atol=1e-6, rtol=1e-3, msg=name)
    torch.manual_seed(0)
    wanted = losses[1] if official else (losses[0] + losses[1]) / 2
    torch.testing.assert_close(stage(b).loss, wanted, atol=1e-6, rtol=1e-5)


def test_d12_a_step_leaves_the_text_tower_and_the_scale_alone(make):
    stage = make()
    text = {name: p.clone() for name, p in stage.encoder.text.state_dict().items()}
    ids = stage.encoder.tokenizer(["a photo of a cat"])
    before, image = stage.encoder.text(ids).pooled, stage.encoder.image(batch().pixels).pooled
    gradients(stage)
    torch.optim.SGD([p for g in stage.param_groups() for p in g["params"]], lr=0.5, weight_decay=0.1).step()
    assert torch.equal(stage.encoder.text(ids).pooled, before)
    assert all(torch.equal(p, text[name]) for name, p in stage.encoder.text.state_dict().items())
    assert not torch.equal(stage.encoder.image(batch().pixels).pooled, image)


def test_the_end_says_how_far_the_tower_moved(make, capsys):
    from clipgraft.log import RunLog

    stage = make(log=RunLog())
    still = stage.final_metrics()
    assert still["weight_drift"] == 0
    assert "next to nothing" in capsys.readouterr().err
    assert still["cosine_to_base"] == pytest.approx(1)
    assert still["condition_gap"] == pytest.approx(still["noise_wrong"] / still["noise_right"] - 1)
    with torch.no_grad():
        for p in stage.encoder.image.parameters():
            p.mul_(1.01)
    moved = stage.final_metrics()
    assert moved["weight_drift"] == pytest.approx(0.01, rel=1e-3)
    assert "next to nothing" not in capsys.readouterr().err
    assert stage.final_metrics() == moved


def test_control_arms(make):
    anchor = Anchor(None)
    alone = make(critique=None, anchor=anchor, anchor_weight=1.0)
    assert set(alone(batch()).terms) == {"anchor", "cosine_to_base"}
    plain, shuffled = make(), make()
    object.__setattr__(shuffled.critique, "shuffled", True)
    assert torch.equal(shuffled._latents(batch()), plain._latents(batch()).roll(1, 0))


def test_latents_of_unchanging_crops_are_computed_once(make):
    stage, calls = make(remember=True), []
    denoiser = stage.critique.objective.denoiser
    inner = denoiser.latents
    object.__setattr__(denoiser, "latents", lambda pixels: calls.append(1) or inner(pixels))
    first, second = stage._latents(batch()), stage._latents(batch())
    assert torch.equal(first, second)
    assert len(calls) == 1


def test_memory_is_bounded_and_a_batch_with_an_unknown_id_is_computed_whole():
    remembered, calls = Remembered(memory=8), []

    def look(ids):
        return remembered(ids, lambda: calls.append(ids) or torch.tensor([float(i) for i in ids]))

    assert look(["1", "2", "3"]).tolist() == [1, 2, 3]  # two fit
    assert look(["2", "1"]).tolist() == [2, 1]
    assert look(["1", "3"]).tolist() == [1, 3]
    assert calls == [["1", "2", "3"], ["1", "3"]]


def test_crops_are_fixed_per_image_and_both_sides_see_the_same_part():
    crops = Crops(Noise(), size=64, area=(0.3, 0.5), seed=0)
    one, again = crops[3], crops[3]
    assert one.image.shape == (3, 64, 64)
    assert torch.equal(one.image, again.image)
    assert torch.equal(one.image, one.extra[CROP])
    assert not torch.equal(one.image, Crops(Noise(), size=64, area=(0.3, 0.5), seed=1)[3].image)
    assert Crops(Noise(), size=64, area=None, seed=0)[3].image.dtype == torch.uint8


class Flow(nn.Module):
    """Knows the clean tokens and keeps what it was asked."""

    def __init__(self, clean):
        super().__init__()
        self.clean = clean

    def standardise(self, tokens):
        return tokens - 1

    def forward(self, noisy, time, condition):
        self.asked = noisy, time, condition
        return self.clean


def test_a_step_of_the_schedule_is_a_time_of_the_flow():
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 5, 3, generator=g), torch.randn(2, 5, 3, generator=g)
    schedule, tower, flow, t = NoiseSchedule(), tiny_clip().eval(), Flow(x0), torch.tensor([100, 999])
    generator = FlowGenerator(flow, tower, schedule=schedule)
    condition = torch.randn(2, 4, 16, generator=g)
    named = generator(schedule.mix(x0, noise, t), t, condition)
    torch.testing.assert_close(named, noise, atol=1e-5, rtol=1e-5)
    noisy, time, told = flow.asked
    s = time[:, None, None]
    torch.testing.assert_close(noisy, (1 - s) * x0 + s * noise, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(told, F.normalize(condition.mean(1), dim=-1))
    pixels = torch.rand(2, 3, 32, 32)
    raw = tower.image(2 * pixels - 1, FeatureRequest(tokens=True)).tokens
    torch.testing.assert_close(generator.latents(pixels), raw - 1)
    with pytest.raises(InputError, match="standardise"):
        FlowGenerator(nn.Linear(2, 2), tower, schedule=schedule)


def test_the_fitted_projection_recovers_a_linear_map_between_text_spaces_and_centres_images():
    g = torch.Generator().manual_seed(0)
    told, true = torch.randn(200, 6, generator=g), torch.randn(6, 4, generator=g)
    wanted, seen = told @ true + 3, torch.randn(50, 6, generator=g) + 2
    layer = nn.Linear(6, 4)
    assert fit_projection(layer, told=told, wanted=wanted, seen=seen, ridge=1e-9) == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(layer.weight, true.T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer(seen).mean(0), wanted.mean(0), atol=1e-4, rtol=1e-4)
    other = torch.randn(200, 4, generator=g)
    assert fit_projection(layer, told=told, wanted=other, seen=seen) < 0.2
