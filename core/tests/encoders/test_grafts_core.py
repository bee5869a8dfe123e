"""Freeze, LoRA and resized positions on plain, custom-text and timm towers."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from clipgraft.config.schema import GraftNode
from clipgraft.encoders import apply_grafts, merge_grafts
from clipgraft.encoders.base import Encoder, Origin
from clipgraft.encoders.grafts import Freeze, ResizePositions
from clipgraft.encoders.lora import Lora
from clipgraft.encoders.openclip import build, open_clip_state
from clipgraft.errors import InputError
from clipgraft.registry import Registry
from clipgraft.testing.tiny import tiny_clip

KINDS = ["vit", "custom-text", "siglip-timm"]
ALL = ("q", "k", "v", "o", "mlp", "projection")
PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry.discover(allow=())


def targets(kind: str) -> tuple[str, ...]:
    return ALL[:-1] if kind == "siglip-timm" else ALL  # its image tower has no projection


def run(encoder: Encoder) -> torch.Tensor:
    image, text = encoder(PIXELS, encoder.tokenizer(["a cat", "a red circle", "dogs"]))
    return torch.cat([image.pooled, text.pooled])


def step(encoder: Encoder, steps: int = 1) -> None:
    """A few contrastive updates of whatever is trainable."""
    optimizer = torch.optim.AdamW([p for p in encoder.parameters() if p.requires_grad], lr=0.05)
    ids = encoder.tokenizer(["a cat", "a red circle", "dogs"])
    for _ in range(steps):
        image, text = encoder(PIXELS, ids)
        optimizer.zero_grad()
        F.cross_entropy(10 * image.unit() @ text.unit().T, torch.arange(3)).backward()
        optimizer.step()


def trainable(encoder: Encoder) -> set[str]:
    return {n for n, p in encoder.named_parameters() if p.requires_grad}


# -- LoRA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_lora_starts_at_the_base_and_reaches_every_weight(kind: str) -> None:
    encoder = tiny_clip(kind=kind)
    before = run(encoder)
    encoder = Lora(rank=2, targets=targets(kind)).apply(encoder)
    assert torch.equal(run(encoder), before)
    run(encoder).square().sum().backward()
    grads = {n: p.grad for n, p in encoder.named_parameters() if p.requires_grad and not n.startswith("logit")}
    assert grads and all(g is not None for g in grads.values())
    assert all(n.endswith((".a", ".b")) for n in grads)
    assert all(g.abs().sum() == 0 for n, g in grads.items() if n.endswith(".a"))  # B is zero at first
    stuck = [n for n, g in grads.items() if n.endswith(".b") and not (g.abs().sum((1, 2)) > 0).all()]
    # a query or key of one pooling token over equal keys would be allowed to stand still: none is
    assert stuck == []


@pytest.mark.parametrize("kind", KINDS)
def test_lora_merges_to_plain_weights(kind: str) -> None:
    encoder, plain = tiny_clip(kind=kind), tiny_clip(kind=kind)
    encoder = Lora(rank=3, alpha=6, targets=targets(kind), biases=True).apply(encoder)
    step(encoder, 3)
    encoder.eval()
    merged = Lora().merge(copy.deepcopy(encoder))
    with torch.no_grad():
        torch.testing.assert_close(run(merged), run(encoder), atol=1e-5, rtol=1e-5)
        assert (run(merged) - run(plain)).abs().max() > 1e-2
    assert merged.state_dict().keys() == plain.state_dict().keys()
    assert open_clip_state(merged).keys() == open_clip_state(plain).keys()
    assert not any("parametrizations" in n for n, _ in merged.named_parameters())
    # the live encoder keeps its adapters and trains on
    before = run(encoder).detach()
    step(encoder.train())
    assert any(n.endswith(".a") for n, _ in encoder.named_parameters())
    assert not torch.equal(run(encoder.eval()), before)


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("tower", ["image", "text"])
def test_lora_changes_what_its_target_names_and_nothing_else(target: str, tower: str) -> None:
    encoder, plain = tiny_clip(), tiny_clip()
    encoder = Lora(rank=2, towers=(tower,), targets=(target,)).apply(encoder)
    for name, parameter in encoder.named_parameters():
        if name.endswith(".b"):
            torch.nn.init.normal_(parameter, std=0.3)
    merged, base = merge(encoder).state_dict(), plain.state_dict()
    changed = {n for n in base if not torch.equal(merged[n], base[n])}
    endings = {
        "o": "attn.out_proj.weight", "mlp": ("c_fc.weight", "c_proj.weight"), "projection": ("proj", "text_projection")
    }  # fmt: skip
    assert changed and all(n.startswith(f"{tower}.") for n in changed)
    assert all(n.endswith(endings.get(target, "in_proj_weight")) for n in changed)
    if target in "qkv":
        for name in changed:
            parts = (merged[name] - base[name]).abs().unflatten(0, (3, -1)).sum((1, 2)) > 0
            assert parts.tolist() == [target == part for part in "qkv"]


def merge(encoder: Encoder) -> Encoder:
    return Lora().merge(encoder)


def test_lora_freezes_its_towers_only() -> None:
    encoder = Lora(towers=("image",)).apply(tiny_clip())
    assert not any(n.startswith("image.") and not n.endswith((".a", ".b")) for n in trainable(encoder))
    assert "text.tower.text_projection" in trainable(encoder) and "logit_scale" in trainable(encoder)


def test_lora_biases() -> None:
    encoder = Lora(towers=("image",), targets=("q", "mlp"), biases=True).apply(tiny_clip())
    names = {n for n in trainable(encoder) if n.startswith("image.") and not n.endswith((".a", ".b"))}
    ends = ("attn.in_proj_bias", "mlp.c_fc.bias", "mlp.c_proj.bias")
    assert len(names) == 6 and all(n.endswith(ends) for n in names)


def test_lora_dropout_is_noise_in_training_only() -> None:
    encoder = Lora(rank=2, dropout=0.5).apply(tiny_clip())
    for name, parameter in encoder.named_parameters():
        if name.endswith(".b"):
            torch.nn.init.normal_(parameter)
    with torch.no_grad():
        encoder.train()
        assert not torch.equal(run(encoder), run(encoder))
        quiet = run(encoder.eval())
        assert torch.equal(run(encoder), quiet)
        # merging in training mode takes the weights without a mask
        torch.testing.assert_close(run(merge(encoder.train()).eval()), quiet, atol=1e-5, rtol=1e-5)


def test_an_adapted_weight_is_computed_once_per_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    from clipgraft.encoders.lora import LowRank

    encoder, calls, forward = Lora(towers=("image",)).apply(tiny_clip()), [], LowRank.forward
    monkeypatch.setattr(LowRank, "forward", lambda self, weight: calls.append(self) or forward(self, weight))
    encoder.image(PIXELS)
    assert len(calls) == len(set(map(id, calls))) == 4  # in_proj and out_proj of two blocks


def test_lora_twice_stacks() -> None:
    encoder = Lora(rank=1, towers=("image",), targets=("q",)).apply(tiny_clip())
    encoder = Lora(rank=2, towers=("image",), targets=("q", "v")).apply(encoder)
    step(encoder, 2)
    with torch.no_grad():
        torch.testing.assert_close(run(merge(copy.deepcopy(encoder))), run(encoder), atol=1e-5, rtol=1e-5)
    assert sum(n.startswith("image.") for n in trainable(encoder)) == 2 * 2 * 2


def test_lora_without_a_site_is_an_error() -> None:
    with pytest.raises(InputError, match="the image tower has no 'projection'"):
        Lora(targets=("q", "projection")).apply(tiny_clip(kind="siglip-timm"))
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32}
    text = {"context_length": 16, "vocab_size": 128, "width": 32, "heads": 2, "layers": 1}
    half = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    resnet = build(config, None, preprocess=half, origin=Origin("t", "t"))
    with pytest.raises(InputError, match="has no 'mlp'"):
        Lora(towers=("image",), targets=("q", "mlp")).apply(resnet)
    pooled = Lora(towers=("image",), targets=("q", "k", "v", "projection")).apply(resnet)
    pooled.image(PIXELS).pooled.sum().backward()
    assert all(p.grad is not None for n, p in pooled.image.named_parameters() if p.requires_grad)


def test_lora_under_autocast_keeps_fp32_gradients() -> None:
    encoder = Lora(rank=2, targets=ALL).apply(tiny_clip())
    with torch.autocast("cpu", torch.bfloat16):
        loss = run(encoder).float().square().sum()
    loss.backward()
    adapters = [p for n, p in encoder.named_parameters() if n.endswith((".a", ".b"))]
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapters)


def test_lora_state_survives_a_round_trip() -> None:
    encoder = Lora(rank=2).apply(tiny_clip())
    step(encoder, 2)
    other = Lora(rank=2).apply(tiny_clip(seed=4))
    other.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        assert torch.equal(run(other), run(encoder))


# -- freeze ----------------------------------------------------------------------------------------------------------


def test_freeze_towers() -> None:
    encoder = Freeze(towers=("image", "scale")).apply(tiny_clip(kind="siglip-timm"))
    assert all(n.startswith("text.") for n in trainable(encoder)) and trainable(encoder)
    encoder.train()
    assert not encoder.image.tower.training and encoder.text.tower.training


def test_freeze_all_but() -> None:
    encoder = Freeze(towers=("image", "text", "scale"), keep=("*.ln_post.*", "logit_scale")).apply(tiny_clip())
    assert trainable(encoder) == {"image.tower.ln_post.weight", "image.tower.ln_post.bias", "logit_scale"}


@pytest.mark.parametrize("kind", KINDS)
def test_freeze_all_but_the_last_block(kind: str) -> None:
    encoder = Freeze(towers=("image", "text", "scale"), keep_last=1).apply(tiny_clip(kind=kind))
    names, block = trainable(encoder), "blocks.1." if kind == "siglip-timm" else "resblocks.1."
    assert any(f"image.tower.{'trunk.' if kind == 'siglip-timm' else 'transformer.'}{block}" in n for n in names)
    assert not any(".0." in n or "embed" in n or "conv1" in n or n.startswith("logit") for n in names)
    tops = {"siglip-timm": "image.tower.trunk.attn_pool.latent"}.get(kind, "image.tower.proj")
    assert tops in names and any(n.startswith("text.tower.text_projection") for n in names)


def test_freeze_leaves_adapters_alone_in_any_order() -> None:
    encoder = Freeze(towers=("image",)).apply(Lora(towers=("image",)).apply(tiny_clip()))
    other = Lora(towers=("image",)).apply(Freeze(towers=("image",)).apply(tiny_clip()))
    assert trainable(encoder) == trainable(other) and any(n.endswith(".a") for n in trainable(encoder))


def test_freeze_pattern_without_a_match() -> None:
    with pytest.raises(InputError, match=r"keep '\*.ln_pst.\*' matches no tensor; names look like"):
        Freeze(keep=("*.ln_pst.*",)).apply(tiny_clip())


# -- positions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [48, (48, 64)])
def test_resized_encoder_takes_the_new_size(kind: str, size: int | tuple[int, int]) -> None:
    encoder = tiny_clip(kind=kind)
    encoder.image.requires_grad_(False)
    encoder = ResizePositions(size=size).apply(encoder)
    h, w = (48, 48) if size == 48 else size
    assert encoder.preprocess.size == (h, w) and encoder.image.grid == (h // 8, w // 8)
    found = encoder.image(torch.randn(1, 3, h, w), SimpleNamespace(tokens=True, layers=()))
    assert found.tokens.shape[1] == h * w // 64 and found.grid == (h // 8, w // 8)
    assert not any(p.requires_grad for p in encoder.image.parameters())
    rebuilt = build(
        encoder.data.model_config,
        open_clip_state(encoder),
        preprocess=encoder.preprocess.as_dict(),
        origin=Origin("t", "t"),
    )
    assert rebuilt.preprocess.size == (h, w)


def test_resizing_is_open_clips_and_the_same_size_changes_nothing() -> None:
    from open_clip.model import resize_pos_embed

    encoder, same = tiny_clip(), ResizePositions(size=32).apply(tiny_clip())
    assert torch.equal(same.image.tower.positional_embedding, encoder.image.tower.positional_embedding)
    state = {"visual.positional_embedding": encoder.image.tower.positional_embedding.detach().clone()}
    resize_pos_embed(state, SimpleNamespace(visual=SimpleNamespace(grid_size=(6, 6))))
    bigger = ResizePositions(size=48).apply(encoder)
    torch.testing.assert_close(bigger.image.tower.positional_embedding.data, state["visual.positional_embedding"])


def test_resnet_positions() -> None:
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32}
    text = {"context_length": 16, "vocab_size": 128, "width": 32, "heads": 2, "layers": 1}
    half = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    encoder = ResizePositions(size=96).apply(build(config, None, preprocess=half, origin=Origin("t", "t")))
    assert encoder.image.grid == (3, 3) and encoder.image(torch.randn(1, 3, 96, 96)).pooled.shape == (1, 16)
    with pytest.raises(InputError, match="square"):
        ResizePositions(size=(96, 64)).apply(encoder)


def test_sizes_that_do_not_fit_the_patches() -> None:
    with pytest.raises(InputError, match=r"\(50, 50\) is no multiple of the patch size \(8, 8\)"):
        ResizePositions(size=50).apply(tiny_clip())


# -- by name ---------------------------------------------------------------------------------------------------------


def test_grafts_by_name_remember_their_full_config(registry: Registry) -> None:
    nodes = [GraftNode(use="lora", rank=2, targets=["q"]), GraftNode(use="core/freeze", towers=["text"])]
    encoder = apply_grafts(tiny_clip(), nodes, registry)
    assert [g.name for g in encoder.data.grafts] == ["core/lora", "core/freeze"]
    lora = encoder.data.grafts[0]
    assert lora.config["alpha"] == 16 and lora.config["targets"] == ["q"] and lora.portable
    merged = merge_grafts(copy.deepcopy(encoder))
    assert merged.data.grafts == [] and len(encoder.data.grafts) == 2
    assert merged.state_dict().keys() == tiny_clip().state_dict().keys()


def test_a_wrong_setting_names_the_graft(registry: Registry) -> None:
    with pytest.raises(InputError, match="core/lora"):
        apply_grafts(tiny_clip(), [GraftNode(use="core/lora", rnak=2)], registry)
    with pytest.raises(InputError, match="unknown graft 'core/lorra'; did you mean core/lora"):
        apply_grafts(tiny_clip(), [GraftNode(use="core/lorra")], registry)
