"""Towers against open_clip's own models: same weights, same numbers."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path

import open_clip
import pytest
import timm
import torch
import transformers
from open_clip.model import CLIP, CustomTextCLIP

from clipgraft.encoders.base import Encoder, Origin
from clipgraft.encoders.lora import Lora
from clipgraft.encoders.openclip import build, open_clip_state
from clipgraft.errors import InputError
from clipgraft.testing.tiny import tiny_clip
from clipgraft.types import FeatureRequest

HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
KINDS = ["vit", "custom-text", "siglip-timm"]
VIT = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16}
TEXT = {"context_length": 12, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2}


def stock(encoder: Encoder) -> torch.nn.Module:
    """open_clip's own model with the encoder's tensors."""
    config = copy.deepcopy(encoder.data.model_config)
    custom = config.pop("custom_text", False)
    timm_kwargs = config["vision_cfg"].pop("timm_kwargs", None)
    with torch.device("meta") if timm_kwargs else nullcontext():
        model = (CustomTextCLIP if custom else CLIP)(**config)
        if timm_kwargs:
            name = config["vision_cfg"]["timm_model_name"]
            model.visual.trunk = timm.create_model(name, num_classes=0, global_pool="map", **timm_kwargs)
    model.load_state_dict(open_clip_state(encoder), assign=bool(timm_kwargs))
    return model.eval()


def build_random(vision: dict, text: dict | None = None, **top: object) -> Encoder:
    torch.manual_seed(0)
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": {**TEXT, **(text or {})}, **top}
    return build(config, None, preprocess=HALF, origin=Origin("test", "test")).eval()


@pytest.fixture(params=KINDS)
def tiny(request: pytest.FixtureRequest) -> Encoder:
    return tiny_clip(kind=request.param).eval()


@torch.no_grad()
def test_embeddings_are_open_clips_bit_for_bit(tiny: Encoder) -> None:
    model, pixels = stock(tiny), torch.randn(3, 3, 32, 32)
    ids = tiny.tokenizer(["a photo of a red circle", "two cats", ""])
    image, text = tiny(pixels, ids)
    assert torch.equal(image.pooled, model.encode_image(pixels))
    assert torch.equal(text.pooled, model.encode_text(ids))
    assert torch.equal(image.unit(), model.encode_image(pixels, normalize=True))
    assert image.tokens is None and image.layers == {} and text.tokens is None


@torch.no_grad()
def test_tokens_and_layers_are_open_clips(tiny: Encoder) -> None:
    pixels, want = torch.randn(2, 3, 32, 32), FeatureRequest(tokens=True, layers=(0, -1))
    found = tiny.image(pixels, want)
    asked = {"indices": [0, 1], "output_fmt": "NLC"}
    raw = stock(tiny).visual.forward_intermediates(pixels, **asked)
    normed = stock(tiny).visual.forward_intermediates(pixels, **asked, normalize_intermediates=True)
    assert set(found.layers) == {0, -1} and found.grid == (4, 4) == tiny.image.grid
    torch.testing.assert_close(found.layers[0], raw["image_intermediates"][0], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.layers[-1], raw["image_intermediates"][1], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.tokens, normed["image_intermediates"][1], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.pooled, raw["image_features"], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.pooled, tiny.image(pixels).pooled, atol=1e-6, rtol=0)
    assert found.map().shape == (2, 32, 4, 4)
    torch.testing.assert_close(found.map()[1, :, 2, 3], found.tokens[1, 2 * 4 + 3])


@torch.no_grad()
def test_class_token_projects_to_the_pooled_embedding() -> None:
    encoder = tiny_clip().eval()
    found = encoder.image(torch.randn(2, 3, 32, 32), FeatureRequest(tokens=True))
    torch.testing.assert_close(found.cls @ encoder.image.tower.proj, found.pooled)


@torch.no_grad()
def test_tokens_are_normed_even_where_the_tower_norms_after_pooling() -> None:
    encoder = build_random({**VIT, "pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True})
    pixels = torch.randn(2, 3, 32, 32)
    found = encoder.image(pixels, FeatureRequest(tokens=True))
    assert torch.equal(found.pooled, stock(encoder).encode_image(pixels))
    torch.testing.assert_close(found.tokens.mean(-1), torch.zeros(2, 16), atol=1e-5, rtol=0)


@torch.no_grad()
def test_resnet_tower() -> None:
    encoder = build_random({"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32})
    pixels = torch.randn(2, 3, 64, 64)
    found = encoder.image(pixels, FeatureRequest(tokens=True, layers=(1, -1)))
    raw = stock(encoder).visual.forward_intermediates(pixels, indices=[1, 4])
    assert torch.equal(found.pooled, stock(encoder).encode_image(pixels))
    torch.testing.assert_close(found.layers[1].transpose(1, 2).unflatten(2, (16, 16)), raw["image_intermediates"][0])
    assert found.tokens.shape == (2, 4, 256) and found.grid == (2, 2) == encoder.image.grid and found.cls is None


@torch.no_grad()
def test_timm_trunk_with_prefix_tokens_inside_stock_open_clip() -> None:
    encoder = build_random(
        {"image_size": 160, "timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "linear"}
    )
    pixels = torch.randn(1, 3, 160, 160)
    found = encoder.image(pixels, FeatureRequest(tokens=True, layers=(-2,)))
    visual = stock(encoder).visual
    assert torch.equal(encoder.image(pixels).pooled, visual(pixels))
    assert torch.equal(found.tokens, visual.trunk.forward_features(pixels)[:, 1:])  # one register token in front
    raw = visual.forward_intermediates(pixels, indices=[7], output_fmt="NLC")["image_intermediates"][0]
    torch.testing.assert_close(found.layers[-2], raw)
    assert found.grid == (10, 10) and found.cls is None and found.tokens.shape == (1, 100, 96)


@torch.no_grad()
def test_timm_convolutional_trunk() -> None:
    encoder = build_random(
        {"image_size": 96, "timm_model_name": "test_convnext", "timm_pool": "avg", "timm_proj": "linear"}
    )
    pixels = torch.randn(1, 3, 96, 96)
    found = encoder.image(pixels, FeatureRequest(tokens=True, layers=(-1,)))
    assert torch.equal(encoder.image(pixels).pooled, stock(encoder).visual(pixels))
    assert found.tokens.shape[1] == found.grid[0] * found.grid[1] == 9
    torch.testing.assert_close(found.map(), encoder.image.tower.trunk.forward_features(pixels))


@torch.no_grad()
def test_trimmed_prompts_give_the_same_embedding() -> None:
    encoder = tiny_clip().eval()
    ids = encoder.tokenizer(["a red circle", "a cat and a dog"])
    short = encoder.text.trim(ids)
    assert encoder.text.trim_exact and short.shape == (2, 7)
    torch.testing.assert_close(encoder.text(short).pooled, encoder.text(ids).pooled, atol=1e-6, rtol=0)


def test_trim_keeps_the_end_token_when_padding_is_the_end_token() -> None:
    encoder = tiny_clip()
    ids = torch.tensor([[126, 5, 6, 127, 127, 127], [126, 5, 127, 127, 127, 127]])
    assert torch.equal(encoder.text.trim(ids), ids[:, :4])


@torch.no_grad()
def test_eos_pooling_takes_the_first_end_token() -> None:
    encoder = build_random(VIT, {"pool_type": "eos", "eos_id": 7})
    ids = torch.tensor([[1, 2, 7, 7, 50, 0, 0, 0, 0, 0, 0, 0]])
    assert torch.equal(encoder.text(ids).pooled, stock(encoder).encode_text(ids))
    assert encoder.text.trim(ids).shape == (1, 3)
    assert encoder.text(ids, FeatureRequest(tokens=True)).mask.tolist() == [[True] * 3 + [False] * 9]


def test_bidirectional_text_is_never_trimmed_and_says_so() -> None:
    encoder = tiny_clip(kind="siglip-timm")
    ids = encoder.tokenizer(["a cat"])
    assert not encoder.text.trim_exact and encoder.text.trim(ids) is ids
    with pytest.raises(InputError, match="got 5 tokens, this text tower takes exactly 16"):
        encoder.text(ids[:, :5])


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_text_tokens_and_mask(kind: str) -> None:
    encoder = tiny_clip(kind=kind).eval()
    ids = encoder.tokenizer(["a cat", "a photo of two dogs"])
    found = encoder.text(ids, FeatureRequest(tokens=True))
    assert found.tokens.shape == (2, 16, 32) and torch.equal(found.mask, ids != 0)


@pytest.mark.parametrize("kind", KINDS)
def test_token_embeddings_stand_for_ids(kind: str) -> None:
    encoder = tiny_clip(kind=kind).eval()
    ids = encoder.tokenizer(["a photo of a cat"])
    embedded = encoder.text.embed(ids).detach().requires_grad_()
    pooled = encoder.text(embedded, ids=ids).pooled
    torch.testing.assert_close(pooled, encoder.text(ids).pooled)
    pooled.sum().backward()
    assert embedded.grad.abs().sum() > 0
    with pytest.raises(InputError, match="ids=ids"):
        encoder.text(embedded)


@pytest.fixture
def language_model(tmp_path: Path) -> Encoder:
    """A tower around a transformers language model, whose configuration lies in a folder."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    transformers.RobertaConfig(**sizes, vocab_size=128, max_position_embeddings=40).save_pretrained(tmp_path)
    text = {
        "hf_model_name": str(tmp_path),
        "hf_pooler_type": "mean_pooler",
        "hf_proj_type": "mlp",
        "hf_model_pretrained": False,
        "context_length": 16,
    }
    config = {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": text, "custom_text": True}
    torch.manual_seed(0)
    return build(config, None, preprocess=HALF, origin=Origin("test", "test")).eval()


def test_language_model_as_text_tower(language_model: Encoder) -> None:
    encoder, ids = language_model, torch.tensor([[0, 5, 6, 7, 2, *[1] * 11], [0, 9, 2, *[1] * 13]])
    model = CustomTextCLIP(**{k: v for k, v in encoder.data.model_config.items() if k != "custom_text"}).eval()
    model.load_state_dict(open_clip_state(encoder))
    found = encoder.text(ids, FeatureRequest(tokens=True))
    assert torch.equal(found.pooled, model.encode_text(ids)) and torch.equal(found.mask, ids != 1)
    assert found.tokens.shape == (2, 16, 32) and not encoder.text.trim_exact and encoder.text.context_length == 16
    embedded = encoder.text.embed(ids).detach().requires_grad_()
    encoder.text(embedded, ids=ids).pooled.sum().backward()
    assert embedded.grad.abs().sum() > 0
    # the file holds no position ids and no attention buffers: they are computed again
    config, state = encoder.data.model_config, open_clip_state(encoder)
    again = build(config, state, preprocess=HALF, origin=Origin("test", "test")).eval()
    assert torch.equal(again.text(ids).pooled, found.pooled) and not any(t.is_meta for t in again.buffers())
    adapted = Lora(rank=2, towers=("text",), targets=("q", "k", "v", "o", "mlp")).apply(again)
    assert torch.equal(adapted.text(ids).pooled, found.pooled)
    adapted.text(ids).pooled.square().sum().backward()
    assert all(p.grad is not None for n, p in adapted.text.named_parameters() if n.endswith((".a", ".b")))


def test_language_model_that_is_not_there() -> None:
    config = {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": {"hf_model_name": "./nowhere"}, "custom_text": True}
    with pytest.raises(InputError, match=r"the text model \./nowhere is not available"):
        build(config, None, preprocess=HALF, origin=Origin("test", "test"))


def test_every_parameter_receives_a_gradient(tiny: Encoder) -> None:
    image, text = tiny(torch.randn(2, 3, 32, 32), tiny.tokenizer(["a cat", "a dog"]), FeatureRequest(tokens=True))
    loss = tiny.logit_scale.exp() * (image.unit() @ text.unit().T).sum() + image.tokens.square().sum()
    (loss if tiny.logit_bias is None else loss + tiny.logit_bias).backward()
    assert [n for n, p in tiny.named_parameters() if p.grad is None] == []


def test_towers_run_under_autocast(tiny: Encoder) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        image, text = tiny(
            torch.randn(2, 3, 32, 32), tiny.tokenizer(["a cat", "a dog"]), FeatureRequest(tokens=True, layers=(0,))
        )
    with torch.no_grad():
        exact = tiny.eval()(None, tiny.tokenizer(["a cat", "a dog"]))[1]
    assert torch.cosine_similarity(text.pooled.float(), exact.pooled).min() > 0.99
    (image.pooled.float().sum() + text.pooled.float().sum()).backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in tiny.parameters())


def test_no_tensor_is_registered_twice(tiny: Encoder) -> None:
    names = [n for n, _ in tiny.named_parameters(remove_duplicate=False)]
    assert len(names) == len({id(p) for p in tiny.parameters()})


def test_frozen_modules_stay_in_eval_mode() -> None:
    encoder = tiny_clip()
    encoder.text.requires_grad_(False)
    encoder.train()
    assert not any(m.training for m in encoder.text.modules())
    assert encoder.image.training and encoder.image.tower.transformer.training
    encoder.text.requires_grad_(True)
    assert all(m.training for m in encoder.train().modules())


def test_wrong_pixel_size_says_what_to_do() -> None:
    with pytest.raises(InputError, match=r"got pixels of \(48, 48\), this tower takes \(32, 32\).*resize-positions"):
        tiny_clip().image(torch.randn(1, 3, 48, 48))


def test_layers_out_of_range() -> None:
    with pytest.raises(InputError, match="ask for -2 to 1"):
        tiny_clip().image(torch.randn(1, 3, 32, 32), FeatureRequest(layers=(2,)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"multimodal_cfg": {}}, "CoCa"),
        ({"text_cfg": {**TEXT, "embed_cls": True}}, "CoCa"),
        ({"vision_cfg": {**VIT, "pool_type": "none"}}, "pool_type none"),
        ({"vision_cfg": {**VIT, "colour": 3}}, "colour"),
        ({"audio_cfg": {}}, "audio_cfg"),
    ],
)
def test_other_architectures_are_refused(change: dict, message: str) -> None:
    config = {"embed_dim": 16, "vision_cfg": dict(VIT), "text_cfg": dict(TEXT), **change}
    with pytest.raises(InputError, match=message):
        build(config, None, preprocess=HALF, origin=Origin("test", "test"))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("arch", ["ViT-B-16-SigLIP", "RN50"])
def test_named_architectures(arch: str) -> None:
    config = open_clip.get_model_config(arch)
    encoder = build(config, None, preprocess=HALF, origin=Origin(arch, arch)).eval()
    model = stock(encoder)
    pixels = torch.randn(1, 3, *encoder.preprocess.size)
    ids = torch.randint(1, 1000, (1, encoder.text.context_length))
    image, text = encoder(pixels, ids, FeatureRequest(tokens=True))
    assert torch.equal(text.pooled, model.encode_text(ids))
    assert torch.equal(image.pooled, model.encode_image(pixels))
    assert image.tokens.shape == (1, image.grid[0] * image.grid[1], encoder.image.width)
