"""What is trained, what is frozen, and what the loss is."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from clipgraft.config.schema import GraftNode, TrainConfig
from clipgraft.encoders import apply_grafts
from clipgraft.registry import Registry
from clipgraft.testing.tiny import tiny_clip
from clipgraft.types import Batch
from clipgraft_diffusion.anchor import Anchor
from clipgraft_diffusion.crops import CROP
from clipgraft_diffusion.decoder import Decoder, DecoderConfig, DecoderStage
from clipgraft_diffusion.eps import EpsObjective, NoiseSchedule
from clipgraft_diffusion.generator import FlowGenerator
from clipgraft_diffusion.unclip.label import UnclipLabel
from clipgraft_diffusion.unclip.model import open_unclip
from clipgraft_diffusion.unclip.stage import Inverter, LabelTeller, Un2ClipStage

NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
TRAIN = TrainConfig(steps=2, batch_size=4, lr=1e-3)
SMALL = DecoderConfig(width=24, heads=2, positions=4, train=TRAIN)


def batch(n=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    crops = torch.randint(0, 256, (n, 3, 64, 64), dtype=torch.uint8, generator=g)
    return Batch(F.avg_pool2d(crops.float() / 255, 2), [str(i) for i in range(n)], extra={CROP: crops})


@pytest.fixture
def make(tiny_unclip):
    def stage(*, passes=1, noise_level=0, tune="full", **more):
        encoder, base = tiny_clip().eval(), tiny_clip().eval()
        encoder.requires_grad_(False)
        if tune == "full":
            encoder.image.requires_grad_(True)
        else:
            node = GraftNode(use="core/lora", towers=("image",), rank=4, dropout=0.0, biases=False)
            encoder = apply_grafts(encoder, (node,), registry=Registry.discover(allow=[]))
        opened = open_unclip(str(tiny_unclip), size=64, embed_dim=16, noise=NOISE, noise_level=noise_level)
        objective = EpsObjective(NoiseSchedule(), opened.decoder, target=opened.target)
        inverter = Inverter(opened.label, objective, passes=passes)
        settings = {"inverter": inverter, "held_out": [batch(3, 1), batch(2, 2)], **more}
        return Un2ClipStage("clip", train=TRAIN, source=[], encoder=encoder, base=base, **settings)

    return stage


def gradients(stage):
    torch.manual_seed(0)
    stage.zero_grad()
    stage.train()
    stage(batch()).loss.backward()
    return {name: p.grad for name, p in stage.named_parameters()}


def test_u02_u03_gradient_reaches_the_whole_tower_and_nothing_else(make):
    grads = gradients(make())
    wanted = {name for name in grads if name.startswith("encoder.image.")}
    assert {name for name, g in grads.items() if g is not None} == wanted
    assert all(grads[name].any() for name in wanted if not name.endswith("in_proj_bias"))


def test_adapters_alone_are_trained_with_lora(make):
    stage = make(tune="lora")
    grads = gradients(stage)
    names = {name for name, g in grads.items() if g is not None}
    assert names
    assert all(name.startswith("encoder.image.") and ".parametrizations." in name for name in names), names
    assert not any(name.endswith(".original") for name in names)
    assert {g["name"] for g in stage.param_groups()} == {"tower"}


def test_frozen_parts_stay_in_eval_mode_and_out_of_the_checkpoint(make):
    stage = make()
    stage.train()
    assert stage.encoder.image.training
    frozen = (stage.base, stage.objective, stage.label, stage.encoder.text)
    assert not any(m.training for part in frozen for m in part.modules())
    assert {name.split(".")[0] for name in stage.state_dict()} == {"encoder"}
    assert not [k for k in stage.trained_state() if not k.startswith("encoder.")]
    assert not [k for k in stage.trained_state() if k.startswith("encoder.text.")]


@pytest.mark.parametrize("passes", [1, 2])
def test_u04_loss_and_gradient_by_hand(make, passes):
    stage = make(passes=passes, noise_level=250)
    found, b = gradients(stage), batch()
    decoder, label = stage.objective.denoiser, stage.label
    unet, prompt = decoder.parts.unet, decoder.parts.prompt
    stage.zero_grad()
    torch.manual_seed(0)
    x0, losses = decoder.latents(b.extra[CROP].float() / 255), []
    z = stage.encoder.image(2 * b.pixels - 1).pooled
    for _ in range(passes):
        t, noise, more = torch.randint(0, 1000, (4,)), torch.randn(4, 4, 8, 8), torch.randn(4, 16)
        signal, rest = label.alphas[250].sqrt(), (1 - label.alphas[250]).sqrt()
        noised = label.mean + label.std * (signal * (z - label.mean) / label.std + rest * more)
        angles = 250 * 10_000 ** (-torch.arange(8) / 8)
        labels = torch.cat([noised, torch.cat([angles.cos(), angles.sin()]).expand(4, -1)], 1)
        share = stage.objective.schedule.alphas[t].view(4, 1, 1, 1)
        x_t, v = share.sqrt() * x0 + (1 - share).sqrt() * noise, share.sqrt() * noise - (1 - share).sqrt() * x0
        told = unet(x_t, t, encoder_hidden_states=prompt.repeat(4, 1, 1), class_labels=labels).sample
        losses.append(F.mse_loss(told, v))
    wanted = sum(losses) / passes
    wanted.backward()
    for name, p in stage.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, atol=1e-6, rtol=1e-3, msg=name)
    torch.manual_seed(0)
    torch.testing.assert_close(stage(b).loss, wanted, atol=1e-6, rtol=1e-5)


def test_u06_a_step_leaves_the_text_tower_and_the_scale_alone(make):
    stage = make()
    text = {name: p.clone() for name, p in stage.encoder.text.state_dict().items()}
    scale, image = stage.encoder.logit_scale.clone(), stage.encoder.image(batch().pixels).pooled
    gradients(stage)
    torch.optim.SGD([p for g in stage.param_groups() for p in g["params"]], lr=0.5, weight_decay=0.1).step()
    assert all(torch.equal(p, text[name]) for name, p in stage.encoder.text.state_dict().items())
    assert torch.equal(stage.encoder.logit_scale, scale)
    assert not torch.equal(stage.encoder.image(batch().pixels).pooled, image)


def test_u07_the_length_of_the_embedding_matters(make):
    stage = make()
    x0, noise, t = torch.zeros(4, 4, 8, 8), torch.randn(4, 4, 8, 8), torch.tensor([500] * 4)
    z, more = torch.randn(4, 16), torch.zeros(4, 16)
    one, three = (stage.objective(x0, stage.label(s * z, noise=more), t, noise) for s in (1, 3))
    assert not torch.allclose(one, three, rtol=1e-4)


def test_u09_patch_tokens_do_not_matter(make):
    """The tower's output for patches is changed after its last block; the loss stays, as it reads the pooled token."""
    stage, b = make(), batch()
    block = stage.encoder.image.tower.transformer.resblocks[-1]

    def loss():
        torch.manual_seed(0)
        return stage(b).loss.detach()

    before = loss()

    def patches(module, given, out):
        return torch.cat([out[:, :1], out[:, 1:] + 7], 1)

    hook = block.register_forward_hook(patches)
    assert torch.equal(loss(), before)
    hook.remove()
    hook = block.register_forward_hook(lambda module, given, out: torch.cat([out[:, :1].roll(1, 2), out[:, 1:]], 1))
    assert not torch.equal(loss(), before)
    hook.remove()


def test_the_end_says_how_far_the_tower_moved_and_what_the_decoder_heard(make):
    stage = make()
    still = stage.final_metrics()
    assert still["weight_drift"] == 0
    assert still["cosine_to_base"] == pytest.approx(1)
    assert still["condition_gap"] == pytest.approx(still["error_wrong"] / still["error_right"] - 1)
    with torch.no_grad():
        for p in stage.encoder.image.parameters():
            p.mul_(1.01)
    moved = stage.final_metrics()
    assert moved["weight_drift"] == pytest.approx(0.01, rel=1e-3)
    assert stage.final_metrics() == moved


def test_control_arms(make):
    alone = make(inverter=None, anchor=Anchor(None), anchor_weight=1.0)
    assert set(alone(batch()).terms) == {"anchor", "cosine_to_base"}
    plain, shuffled = make(), make()
    object.__setattr__(shuffled.inverter, "shuffled", True)
    assert torch.equal(shuffled._latents(batch()), plain._latents(batch()).roll(1, 0))


def own_decoder():
    base = tiny_clip().eval()
    torch.manual_seed(0)
    label = UnclipLabel(embed_dim=16, noise_level="uniform")
    label.estimate([base.image(2 * batch(8).pixels - 1).pooled])
    decoder = Decoder(SMALL, base.image, told=32, unit=False)
    stage = DecoderStage(
        "decoder",
        config=SMALL.model_copy(update={"noise": 0.0}),
        source=[],
        held_out=[batch()],
        base=base,
        decoder=decoder,
        teller=LabelTeller(label),
        captions=False,
    )
    return base, label, decoder, stage


def test_a_decoder_of_ones_own_learns_from_labels_and_leaves_their_statistics():
    _, label, decoder, stage = own_decoder()
    assert {n.split(".")[0] for n, p in stage.named_parameters() if p.requires_grad} == {"decoder"}
    optimizer, losses = torch.optim.AdamW(decoder.parameters(), lr=1e-2), []
    for _ in range(30):
        torch.manual_seed(0)
        output = stage(batch())
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < 0.5 * losses[0]
    left = stage.components()
    assert set(left) == {"decoder", "teller"}
    again = UnclipLabel(embed_dim=16)
    LabelTeller(again).load_state_dict(left["teller"].state_dict())
    assert torch.equal(again.mean, label.mean)
    assert again.mean.any()


def test_u02_gradient_passes_a_decoder_of_ones_own():
    base, label, decoder, _ = own_decoder()
    schedule = NoiseSchedule()
    flow = FlowGenerator(decoder, base, schedule=schedule, unit=False, target="velocity")
    z = torch.randn(4, 16, requires_grad=True)
    x0 = flow.latents(batch().pixels)
    t = torch.tensor([900, 950, 980, 999])
    EpsObjective(schedule, flow, target="velocity")(x0, label(z), t, torch.randn_like(x0)).sum().backward()
    assert bool((z.grad.abs().sum(1) > 0).all())
    assert not any(p.grad is not None for p in flow.parameters())
