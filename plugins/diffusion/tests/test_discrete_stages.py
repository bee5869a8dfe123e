"""What the discrete denoiser's stages train and leave alone: the facts of the continuous ones, restated."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clipgraft.config.schema import GraftNode, TrainConfig
from clipgraft.encoders import apply_grafts
from clipgraft.registry import current
from clipgraft.testing.tiny import tiny_clip
from clipgraft.types import Batch
from clipgraft_diffusion.anchor import Anchor
from clipgraft_diffusion.codes import TokenCodes
from clipgraft_diffusion.condition import projector
from clipgraft_diffusion.genhancer.stages import ClipStage, GeneratorStage
from clipgraft_diffusion.latent import TOKENS, TokenLatent
from clipgraft_diffusion.masked import MaskedFeedback, MaskLaw
from clipgraft_diffusion.perceiver import Perceiver
from clipgraft_diffusion.target import Target

TRAIN = TrainConfig(steps=2, batch_size=4, lr=1e-3)
LORA = {"rank": 4, "alpha": 4.0, "towers": ("image",), "targets": ("q", "k", "v", "o", "mlp"), "biases": True}


class Empty:
    """A source that these tests never read."""

    name, fingerprint, templates, attributes, classes = "empty", "empty", (), {}, ()

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> None:
        raise AssertionError("not read here")


def pixels(n=4, seed=0):
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def batch(n=4, seed=0):
    return Batch(pixels=pixels(n, seed), ids=[str(i) for i in range(n)])


def parts(kind="vit", *, shuffled=False):
    encoder, base = tiny_clip(kind=kind).eval(), tiny_clip(kind=kind).eval()
    tokens = TokenLatent(None, like=base.image, preprocess=base.preprocess)
    codes = TokenCodes(tokens, size=12)
    codes.codebook.fit([tokens.raw(base.image(base.preprocess.normalize(pixels(32, 9)), TOKENS)).detach()])
    torch.manual_seed(0)
    denoiser = Perceiver(codes.vectors, codes.grid, width=32, heads=2, layers=2)
    feedback = MaskedFeedback(projector(encoder.image.embed_dim, 32), denoiser, masks=MaskLaw())
    return encoder, Target(base, codes, shuffled=shuffled), feedback


def generator_stage(**changes):
    _, target, feedback = parts(**changes)
    return GeneratorStage(
        "generator", train=TRAIN, source=Empty(), target=target, feedback=feedback, held_out=pixels(6)
    )


def clip_stage(kind="vit", *, tune="lora", anchor=False, **changes):
    encoder, target, feedback = parts(kind)
    encoder.requires_grad_(False)
    if tune == "lora":
        encoder = apply_grafts(encoder, (GraftNode(use="core/lora", **LORA),), registry=current())
    else:
        encoder.image.requires_grad_(True)
    classes = F.normalize(torch.randn(3, encoder.image.embed_dim, generator=torch.Generator().manual_seed(0)), dim=-1)
    options = {"anchor": Anchor(classes), "anchor_weight": 0.5} if anchor else {"anchor": None}
    settings = {"encoder": encoder, "target": target, "feedback": feedback, "held_out": pixels(6), **options, **changes}
    return ClipStage("clip", train=TRAIN, source=Empty(), **settings)


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


def test_x9_stage_1_trains_projector_and_predictor_only_and_leaves_clip_bit_identical():
    stage = generator_stage()
    before = stage.target.look(pixels())
    grads = gradients(stage)
    assert {n for n, g in grads.items() if g is not None} == {n for n in grads if n.startswith("feedback.")}
    assert {n.split(".")[1] for n in grads if n.startswith("feedback.")} == {"condition", "denoiser"}
    torch.optim.SGD([p for g in stage.param_groups() for p in g["params"]], lr=0.1).step()
    after = stage.target.look(pixels())
    assert torch.equal(after.z, before.z)
    assert torch.equal(after.x1, before.x1)


def test_x9_stage_2_only_leaves_the_generator_without_gradient_and_reaches_every_lora_tensor():
    grads = gradients(clip_stage())
    frozen = ("feedback.denoiser.", "feedback.condition.", "target.", "encoder.text.")
    for part in frozen:
        assert [name for name in grads if name.startswith(part)]
    assert all(g is None for name, g in grads.items() if name.startswith(frozen))
    adapters = {n: g for n, g in grads.items() if n.startswith("encoder.image.") and ".parametrizations." in n}
    first, second = ({n: g for n, g in adapters.items() if n.endswith(end)} for end in (".a", ".b"))
    assert len(first) == len(second) == 2 * 4
    assert all(g is not None and not g.any() for g in first.values())
    assert all(g is not None and g.any() for g in second.values())


@pytest.mark.parametrize("kind", ["vit", "siglip-timm"])
def test_x9_full_tuning_reaches_the_whole_image_tower_and_nothing_of_the_text_tower(kind):
    grads = gradients(clip_stage(kind, tune="full"))
    image = {n: g for n, g in grads.items() if n.startswith("encoder.image.")}
    assert [n for n, g in image.items() if g is None or not g.any()] == []
    assert all(g is None for n, g in grads.items() if n.startswith("encoder.text."))
    assert grads["encoder.logit_scale"] is None


def test_x9_stage_2_all_trains_the_generator_too_but_never_the_codes():
    stage = clip_stage(train_generator=True, generator_lr=0.5)
    grads = gradients(stage)
    assert all(g is not None for n, g in grads.items() if n.startswith("feedback."))
    assert {g["name"]: g["lr_scale"] for g in stage.param_groups()} == {"tower": 1.0, "generator": 0.5}
    trained = {id(p) for g in stage.param_groups() for p in g["params"]}
    assert not any(id(t) in trained for t in [stage.feedback.denoiser.vectors, *stage.target.parameters()])


def test_terms_and_their_weights():
    torch.manual_seed(0)
    out = clip_stage(anchor=True, tune="full", weight=2.0).train()(batch())
    assert set(out.terms) == {"cross_entropy", "anchor", "cosine_to_base"}
    wanted = 2 * out.terms["cross_entropy"].item() + 0.5 * out.terms["anchor"].item()
    assert out.loss.item() == pytest.approx(wanted, rel=1e-6)


def test_shuffled_control_gives_every_image_another_ones_codes():
    seen, shuffled = generator_stage().target(batch()), generator_stage(shuffled=True).target(batch())
    assert torch.equal(shuffled.z, seen.z)
    assert torch.equal(shuffled.x1, seen.x1.roll(1, 0))
    assert not torch.equal(shuffled.x1, seen.x1)


def test_remembered_codes_are_the_codes():
    target = parts()[1]
    fresh = target.look(pixels()).x1
    target.remember = True
    assert all(torch.equal(target(batch()).x1, fresh) for _ in range(2))


def test_components_carry_the_codebook_into_stage_2():
    stage = generator_stage()
    found = stage.components()
    assert set(found) == {"denoiser", "condition", "latent"}
    other = TokenCodes(stage.target.latent.tokens, size=12)
    assert not torch.equal(other.vectors, stage.target.latent.vectors)
    other.fitted().load_state_dict(found["latent"].state_dict())
    assert torch.equal(other.vectors, stage.target.latent.vectors)
    assert torch.equal(found["denoiser"].state_dict()["vectors"], other.vectors)


def test_golden_loss_over_20_steps_of_stage_1():
    """Changes only with the method or torch's generator; look before you update it."""
    stage = generator_stage()
    optimizer, losses = torch.optim.AdamW(stage.feedback.parameters(), lr=2e-3), []
    torch.manual_seed(0)
    for k in range(20):
        optimizer.zero_grad()
        out = stage(batch(8, seed=k))
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[0] == pytest.approx(GOLDEN[0], rel=1e-3)
    assert losses[-1] == pytest.approx(GOLDEN[1], rel=1e-2)


GOLDEN = (2.69807, 2.45379)
