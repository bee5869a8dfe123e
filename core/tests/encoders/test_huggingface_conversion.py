"""Folders that transformers itself writes: same logits, exact round trip, clear refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from clipgraft.encoders import load
from clipgraft.encoders.base import Encoder, Origin
from clipgraft.encoders.huggingface import huggingface_state, write_huggingface
from clipgraft.encoders.openclip import why_not_open_clip
from clipgraft.errors import InputError
from clipgraft.registry import Registry
from clipgraft.testing.tiny import TinyTokenizer, tiny_clip
from clipgraft.types import FeatureRequest

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SIZES, "image_size": 32, "patch_size": 8}
TEXT = {**SIZES, "vocab_size": 128, "max_position_embeddings": 16, "bos_token_id": 126, "eos_token_id": 127}
PROCESSOR = {
    "clip": {
        "crop_size": {"height": 32, "width": 32},
        "do_center_crop": True,
        "size": {"shortest_edge": 32},
        "resample": 3,
    },
    "siglip": {"size": {"height": 32, "width": 32}, "resample": 2},
}
PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry.discover(allow=())


def write(folder: Path, kind: str, *, vision: dict | None = None, text: dict | None = None) -> Path:
    torch.manual_seed(7)
    tower = {"vision_config": {**VISION, **(vision or {})}, "text_config": {**TEXT, **(text or {})}}
    if kind == "clip":
        model = transformers.CLIPModel(transformers.CLIPConfig(**tower, projection_dim=24))
    else:
        model = transformers.SiglipModel(transformers.SiglipConfig(**tower))
    for parameter in model.parameters():  # transformers starts biases at zero, which would hide a lost one
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    values = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR[kind], **values}))
    TinyTokenizer().save(str(folder))
    return folder


def logits(encoder: Encoder, ids: torch.Tensor) -> torch.Tensor:
    image, text = encoder(PIXELS, ids)
    scores = encoder.logit_scale.exp() * image.unit() @ text.unit().T
    return scores if encoder.logit_bias is None else scores + encoder.logit_bias


def theirs(folder: Path, kind: str, ids: torch.Tensor) -> torch.Tensor:
    model = (transformers.CLIPModel if kind == "clip" else transformers.SiglipModel).from_pretrained(folder).eval()
    return model(input_ids=ids, pixel_values=PIXELS).logits_per_image


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "vision", "text"),
    [
        ("clip", {}, {}),
        ("clip", {"hidden_act": "gelu"}, {"hidden_act": "gelu", "eos_token_id": 2}),
        ("clip", {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-3}, {"hidden_act": "gelu"}),
        ("siglip", {}, {}),
        ("siglip", {"hidden_act": "gelu"}, {"hidden_act": "gelu", "layer_norm_eps": 1e-4}),
    ],
)
def test_logits_and_round_trip(tmp_path: Path, registry: Registry, kind: str, vision: dict, text: dict) -> None:
    folder = write(tmp_path / kind, kind, vision=vision, text=text)
    encoder = load(str(folder), registry=registry).eval()
    ids = encoder.tokenizer(["a photo of a cat", "two red dogs", ""])
    assert torch.equal(ids, TinyTokenizer()(["a photo of a cat", "two red dogs", ""]))
    torch.testing.assert_close(logits(encoder, ids), theirs(folder, kind, ids), atol=1e-5, rtol=1e-5)
    assert encoder.preprocess.resize_mode == {"clip": "shortest", "siglip": "squash"}[kind]
    assert encoder.preprocess.interpolation == {"clip": "bicubic", "siglip": "bilinear"}[kind]
    assert encoder.preprocess.mean == (0.4, 0.5, 0.6) and encoder.data.model_config.get("quick_gelu", False) == (
        kind == "clip" and not vision
    )
    back, stored = huggingface_state(encoder), load_file(folder / "model.safetensors")
    assert back.keys() == stored.keys() and all(torch.equal(back[k], stored[k]) for k in stored)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_what_is_written_opens_in_transformers(tmp_path: Path, registry: Registry, kind: str) -> None:
    encoder = load(str(write(tmp_path / "a", kind)), registry=registry).eval()
    folder = write_huggingface(encoder, tmp_path / "b")
    ids = encoder.tokenizer(["a photo of a cat", "two red dogs"])
    torch.testing.assert_close(theirs(folder, kind, ids), logits(encoder, ids), atol=1e-5, rtol=1e-5)
    again = load(str(folder), registry=registry).eval()
    assert torch.equal(logits(again, ids), logits(encoder, ids)) and again.preprocess == encoder.preprocess
    assert torch.equal(again.tokenizer(["a cat"]), encoder.tokenizer(["a cat"]))
    assert {k: v for k, v in again.data.model_config.items() if k != "text_cfg"} == {
        k: v for k, v in encoder.data.model_config.items() if k != "text_cfg"
    }


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "custom-text", "siglip-timm"])
def test_any_open_clip_model_of_that_shape_converts(tmp_path: Path, kind: str) -> None:
    encoder = tiny_clip(kind=kind).eval()
    folder, ids = write_huggingface(encoder, tmp_path / "hf"), encoder.tokenizer(["a photo of a cat", "dogs"])
    hf_kind = "siglip" if kind == "siglip-timm" else "clip"
    torch.testing.assert_close(theirs(folder, hf_kind, ids), logits(encoder, ids), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_patch_tokens_are_transformers(tmp_path: Path, registry: Registry) -> None:
    folder = write(tmp_path / "siglip", "siglip")
    encoder, model = (
        load(str(folder), registry=registry).eval(),
        transformers.SiglipModel.from_pretrained(folder).eval(),
    )
    expected = model.vision_model(PIXELS).last_hidden_state
    found = encoder.image(PIXELS, FeatureRequest(tokens=True)).tokens
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_hub_repository_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--someone--clip"
    (repository / "refs").mkdir(parents=True)
    (repository / "snapshots").mkdir()
    (repository / "refs" / "main").write_text("1" * 40)
    write(tmp_path / "clip", "clip").rename(repository / "snapshots" / ("1" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    encoder = load("hf:someone/clip")
    assert encoder.data.model_config["text_cfg"]["hf_tokenizer_name"] == "someone/clip"
    assert encoder.data.origin == Origin("hf:someone/clip", "hf-clip")
    assert torch.equal(encoder.tokenizer(["a cat"]), TinyTokenizer()(["a cat"]))


def test_sharded_weights(tmp_path: Path, registry: Registry) -> None:
    """Large models are saved as several files with an index."""
    whole = write(tmp_path / "clip", "clip")
    model = transformers.CLIPModel.from_pretrained(whole)
    folder = tmp_path / "shards"
    shutil.copytree(whole, folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    expected = load(str(whole), registry=registry).state_dict()
    found = load(str(folder), registry=registry).state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[k], v) for k, v in expected.items())
    shards[0].rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(InputError, match=f"weights file .*{shards[0].name} is missing"):
        load(str(folder), registry=registry)
    index = folder / "model.safetensors.index.json"
    for content, message in (("{}", "no index of shards"), ('{"weight_map": {"a": "../x.safetensors"}}', "beside it")):
        index.write_text(content)
        with pytest.raises(InputError, match=message):
            load(str(folder), registry=registry)


def test_siglip_of_its_own_size_or_activation_cannot_be_held_by_open_clip(tmp_path: Path, registry: Registry) -> None:
    encoder = load(str(write(tmp_path / "siglip", "siglip")), registry=registry)
    assert "timm image tower differs" in why_not_open_clip(encoder)
    assert why_not_open_clip(load(str(write(tmp_path / "clip", "clip")), registry=registry)) == ""


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", {"model_type": "blip"}, r"holds a 'blip' model; expected model_type clip or siglip"),
        ("preprocessor_config.json", None, "has no preprocessor_config.json, so its mean and std are unknown"),
        ("preprocessor_config.json", {"image_mean": [0.5] * 3, "size": {"shortest_edge": 32}}, "preprocess_cfg.std"),
        ("preprocessor_config.json", {"resample": 1}, "resizes with resample 1; expected 2"),
        (
            "preprocessor_config.json",
            {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 64, "width": 64}},
            r"declares images of \(64, 64\), but the model takes \(32, 32\)",
        ),
        ("config.json", "[", "can't be read as a JSON object"),
    ],
)
def test_incomplete_folders(tmp_path: Path, registry: Registry, file: str, content: object, message: str) -> None:
    folder = write(tmp_path / "clip", "clip")
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=message):
        load(str(folder), registry=registry)


def test_mixed_activations_are_refused(tmp_path: Path, registry: Registry) -> None:
    folder = write(tmp_path / "clip", "clip", vision={"hidden_act": "gelu"})
    with pytest.raises(InputError, match=r"can't mix or doesn't know these activations: \['gelu', 'quick_gelu'\]"):
        load(str(folder), registry=registry)


def test_siglip_norms_that_timm_has_not_are_refused(tmp_path: Path, registry: Registry) -> None:
    folder = write(tmp_path / "siglip", "siglip", vision={"layer_norm_eps": 1e-4})
    with pytest.raises(InputError, match=r"norms with eps 1e-6, this one has 0.0001"):
        load(str(folder), registry=registry)


def test_what_transformers_has_no_place_for(tmp_path: Path) -> None:
    from clipgraft.encoders.openclip import build

    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
    text = {"context_length": 16, "vocab_size": 128, "width": 32, "heads": 2, "layers": 1}
    half = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    scaled = {"embed_dim": 16, "vision_cfg": {**vision, "ls_init_value": 0.1}, "text_cfg": text}
    with pytest.raises(InputError, match=r"ls_1.gamma has no place in a plain CLIP"):
        write_huggingface(build(scaled, None, preprocess=half, origin=Origin("t", "t")), tmp_path / "a")
    mean = {"embed_dim": 16, "vision_cfg": {**vision, "pool_type": "avg"}, "text_cfg": text}
    with pytest.raises(InputError, match="pools in a way"):
        write_huggingface(build(mean, None, preprocess=half, origin=Origin("t", "t")), tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
@torch.no_grad()
def test_vit_b_32_in_both_formats(tmp_path: Path, registry: Registry) -> None:
    torch.manual_seed(0)
    config = transformers.CLIPConfig(projection_dim=512)
    config.text_config.eos_token_id = 2
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path / "hf")
    values = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"shortest_edge": 224}}
    (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps(values))
    encoder = load(str(tmp_path / "hf"), registry=registry).eval()
    pixels, ids = torch.randn(2, 3, 224, 224), encoder.tokenizer(["a photo of a cat", "two dogs in the snow"])
    image, text = encoder(pixels, ids)
    out = model(input_ids=ids, pixel_values=pixels)
    torch.testing.assert_close(image.unit(), out.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(text.unit(), out.text_embeds, atol=1e-5, rtol=0)

    import open_clip

    from clipgraft.checkpoint import write_export

    write_export(encoder, tmp_path / "open_clip")
    stock, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'open_clip'}")
    assert torch.equal(stock.eval().encode_image(pixels), image.pooled)
    assert torch.equal(stock.encode_text(open_clip.get_tokenizer("ViT-B-32")(["a photo of a cat"])), text.pooled[:1])
    back, stored = huggingface_state(encoder), load_file(tmp_path / "hf" / "model.safetensors")
    assert back.keys() == stored.keys() and all(torch.equal(back[k], stored[k]) for k in stored)
