"""A text model as the text tower of a CLIP: what an export keeps, what opens it again, and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from clipgraft import encoders
from clipgraft.checkpoint import OWN_WEIGHTS, open_export, read_manifest, write_export
from clipgraft.cli import app
from clipgraft.config.schema import GraftNode
from clipgraft.encoders import apply_grafts
from clipgraft.encoders.openclip import why_not_open_clip
from clipgraft.errors import InputError
from clipgraft.evaluation.feature_cache import tower_digest
from clipgraft.execution import run_recipe
from clipgraft.registry import Registry
from clipgraft.testing.tiny import tiny_clip
from clipgraft.types import FeatureRequest
from clipgraft_llm.testing import LLAMA_TEMPLATE, write_tiny_embedder, write_tiny_llama
from clipgraft_llm.tower.text_only import open_text_model
from clipgraft_llm.tower.visual import reset_projection

torch.set_num_threads(1)
TEXTS = ["a red dog", "a large yellow cat over a small white car"]


@pytest.fixture(scope="module")
def registry():
    return Registry.discover(allow=["llm"])


@pytest.fixture
def llama(tmp_path):
    return write_tiny_llama(tmp_path / "models" / "llama")


def grafted(folder, registry, *, base=None, **more):
    torch.manual_seed(3)
    node = GraftNode(use="llm/transformer-text", model=str(folder), blocks=1, **more)
    return apply_grafts(base or tiny_clip().eval(), [node], registry).eval()


def said(encoder):
    with torch.no_grad():
        return encoder.text(encoder.text.trim(encoder.tokenizer(TEXTS))).pooled


def test_the_tower_keeps_the_contract_of_text_encoders(llama, registry):
    encoder = grafted(llama, registry, template=LLAMA_TEMPLATE, attention="bidirectional")
    ids = encoder.tokenizer(TEXTS)
    assert ids.shape == (2, encoder.tokenizer.context_length) and ids.dtype == torch.int64
    assert encoder.text.embed_dim == encoder.image.embed_dim == 16 and encoder.text.width == 32
    whole = encoder.text(ids, FeatureRequest(tokens=True))
    assert whole.tokens.shape == (*ids.shape, 32)
    assert whole.mask.sum(1).tolist() == [len(encoder.tokenizer.ids(text)[0]) for text in TEXTS]
    trimmed = encoder.text.trim(ids)
    assert trimmed.shape[1] < ids.shape[1] and torch.allclose(said(encoder), whole.pooled, atol=1e-5)
    embedded = encoder.text(encoder.text.embed(trimmed), ids=trimmed).pooled
    assert torch.allclose(embedded, said(encoder), atol=1e-6)
    with pytest.raises(InputError, match="without their ids"):
        encoder.text(encoder.text.embed(trimmed))


def test_a_referred_model_is_no_part_of_the_tower(llama, registry):
    encoder = grafted(llama, registry)
    assert encoder.text._referred.model is None  # not read before it is needed
    names = [n for n, _ in encoder.text.named_parameters()]
    assert names and all(n.startswith("projection.") for n in names)
    said(encoder)
    language = encoder.text.language
    assert not any(p.requires_grad for p in language.parameters()) and not language.training
    assert [n for n, _ in encoder.text.named_parameters()] == names
    encoder.train()
    assert not encoder.text.language.training
    assert all(not k.startswith("text.inner") for k in encoder.state_dict())


def test_an_export_by_reference_opens_again_and_says_the_same(llama, registry, tmp_path):
    encoder = grafted(llama, registry, template=LLAMA_TEMPLATE, attention="bidirectional")
    folder = write_export(encoder, tmp_path / "export")
    manifest = read_manifest(folder)
    assert manifest["level"] == "L2" and "llm/transformer-text" in manifest["reason"]
    assert (folder / OWN_WEIGHTS).stat().st_size < (llama / "model.safetensors").stat().st_size * 4
    again = open_export(folder, registry=registry).eval()
    assert torch.equal(said(again), said(encoder))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in encoder.state_dict().items())
    twice = write_export(again, tmp_path / "twice")
    assert torch.equal(said(open_export(twice, registry=registry).eval()), said(encoder))
    assert encoder.text.language is not None and encoder.data.grafts[0].portable is False


def test_a_changed_or_missing_model_is_refused_and_a_moved_one_found(llama, registry, tmp_path, monkeypatch):
    encoder = grafted(llama, registry)
    folder, expected = write_export(encoder, tmp_path / "export"), said(encoder)
    moved = tmp_path / "other" / "llama"
    moved.parent.mkdir()
    shutil.move(llama, moved)
    with pytest.raises(InputError, match=r"no such directory.*CLIPGRAFT_LLM_PATH"):
        open_export(folder, registry=registry)
    monkeypatch.setenv("CLIPGRAFT_LLM_PATH", str(moved.parent))
    assert torch.equal(said(open_export(folder, registry=registry).eval()), expected)
    write_tiny_llama(moved, seed=1)
    with pytest.raises(InputError, match=r"changed since this was saved: fingerprint \w{12}, expected \w{12}"):
        open_export(folder, registry=registry)


def test_a_stored_model_needs_nothing_else(llama, registry, tmp_path):
    encoder = grafted(llama, registry, weights="stored", template=LLAMA_TEMPLATE, attention="bidirectional")
    expected = said(encoder)
    folder = write_export(encoder, tmp_path / "export")
    assert any(k.startswith("text.inner.model.layers.0") for k in load_file(folder / OWN_WEIGHTS))
    shutil.rmtree(llama)
    again = open_export(folder, registry=registry).eval()
    assert torch.allclose(said(again), expected, atol=1e-6)
    assert again.tokenizer.settings == encoder.tokenizer.settings
    twice = write_export(again, tmp_path / "twice")
    shutil.rmtree(folder)
    assert torch.allclose(said(open_export(twice, registry=registry).eval()), expected, atol=1e-6)


def test_the_command_refuses_to_write_it_for_open_clip(llama, registry, tmp_path):
    folder = write_export(grafted(llama, registry), tmp_path / "export")
    found = CliRunner().invoke(app, ["export", str(folder), "--format", "open_clip", "--out", str(tmp_path / "out")])
    assert isinstance(found.exception, InputError) and "llm/transformer-text" in str(found.exception)
    assert "llm/transformer-text" in why_not_open_clip(open_export(folder, registry=registry))


def test_features_on_disk_tell_two_text_models_apart(llama, registry, tmp_path):
    one = grafted(llama, registry)
    other = grafted(write_tiny_llama(tmp_path / "second", seed=1), registry)
    assert not torch.equal(one.text.pin, other.text.pin)
    assert tower_digest(one.text, one.data) != tower_digest(other.text, other.data)


def test_an_embedding_model_goes_the_same_way(registry, tmp_path):
    encoder = grafted(write_tiny_embedder(tmp_path / "embedder"), registry, projection="linear")
    assert len(list(encoder.text.projection.parameters())) == 2 and encoder.tokenizer.settings.unit
    folder = write_export(encoder, tmp_path / "export")
    assert torch.equal(said(open_export(folder, registry=registry).eval()), said(encoder))


@pytest.mark.parametrize("kind", ["vit", "custom-text"])
def test_a_joint_space_of_its_own(llama, registry, tmp_path, kind):
    encoder = grafted(llama, registry, base=tiny_clip(kind=kind).eval(), joint=24, reset_visual=True)
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        image = encoder.image(pixels).pooled
    assert image.shape == said(encoder).shape == (2, 24)
    again = open_export(write_export(encoder, tmp_path / "export"), registry=registry).eval()
    with torch.no_grad():
        assert torch.equal(again.image(pixels).pooled, image)


def test_a_projection_that_is_none_can_not_be_drawn_anew():
    encoder = tiny_clip(kind="siglip-timm")
    encoder.image.tower.head = nn.Sequential()
    with pytest.raises(InputError, match="ends without a linear projection"):
        reset_projection(encoder, embed_dim=8)


def test_a_text_model_alone_is_an_encoder_without_images(llama, registry):
    encoder = encoders.load(f"llm:{llama}", registry=registry).eval()
    ids = encoder.tokenizer(TEXTS)
    assert encoder.text(ids).pooled.shape == (2, 32) and not encoder.data.model_config
    with pytest.raises(InputError, match="has no image tower"):
        encoder.image(torch.rand(1, 3, 1, 1))
    assert open_text_model("open_clip:ViT-B-32") is None
    with pytest.raises(InputError, match="no such directory"):
        encoders.load("llm:/nowhere/at/all", registry=registry)


def test_settings_travel_with_a_directory_of_ours(llama, registry):
    encoder = grafted(llama, registry, template=LLAMA_TEMPLATE, attention="bidirectional", max_length=40)
    encoder.tokenizer.save(str(llama))
    described = json.loads((llama / "text_model.json").read_text())
    assert described["template"] == LLAMA_TEMPLATE and described["max_length"] == 40
    plain = encoders.load(f"llm:{llama}", registry=registry)
    assert plain.tokenizer.settings == encoder.tokenizer.settings


def test_a_plain_recipe_trains_the_projection_of_a_grafted_tower(llama, registry, tmp_path):
    """The graft in a recipe that knows nothing of it: one step from a folder of pictures to an export."""
    from PIL import Image

    for k, name in enumerate(("red", "blue", "green", "black")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), (60 * k, 10, 200)).save(tmp_path / "pictures" / name / "0.png")
    base = write_export(tiny_clip().eval(), tmp_path / "base")
    found = run_recipe(
        "core/finetune",
        overrides={
            "model.from": str(base), "data.from": f"folder:{tmp_path}/pictures", "losses": [{"use": "core/clip"}],
            "grafts": [{"use": "llm/transformer-text", "model": str(llama), "projection": "linear"}],
            "train.steps": 2, "train.batch_size": 4, "train.lr": 0.01, "threads": 1,
        },
        out=tmp_path / "run",
        registry=registry,
    )  # fmt: skip
    encoder = open_export(found.export, registry=registry).eval()
    assert said(encoder).shape == (2, 16) and encoder.data.grafts[0].name == "llm/transformer-text"
