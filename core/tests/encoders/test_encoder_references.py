"""Model references: what opens, what is refused, and how it is said. All files are written here in the real format."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from clipgraft.encoders import load, openclip
from clipgraft.encoders.openclip import open_clip_state
from clipgraft.encoders.tokenizers import BpeTokenizer, HuggingFaceTokenizer, tokenizer_for
from clipgraft.errors import InputError
from clipgraft.registry import Registry
from clipgraft.testing.tiny import TinyTokenizer, tiny_clip

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 16, "width": 32, "heads": 2, "layers": 2},
}
PREPROCESS = {"size": 32, "mode": "RGB", "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "resize_mode": "squash"}
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry.discover(allow=())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What open_clip's users publish: a configuration and weights that open_clip initialised itself."""
    return write(tmp_path / "model")


def write(folder: Path, *, config: dict | None = None, preprocess: dict | None = None, custom: bool = False) -> Path:
    folder.mkdir()
    config = {**(config or CONFIG), **({"custom_text": True} if custom else {})}
    settings = {"model_cfg": config, "preprocess_cfg": PREPROCESS if preprocess is None else preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    torch.manual_seed(3)
    model = open_clip.create_model(f"local-dir:{folder}")
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@torch.no_grad()
@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize("prefix", ["local-dir:", ""])
def test_open_clip_folder_gives_open_clips_numbers(
    tmp_path: Path, registry: Registry, custom: bool, prefix: str
) -> None:
    folder = write(tmp_path / "model", custom=custom)
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    ids = open_clip.get_tokenizer(f"local-dir:{folder}")(["a photo of a cat", "two dogs"])
    encoder = load(f"{prefix}{folder}", registry=registry).eval()
    assert torch.equal(encoder.tokenizer(["a photo of a cat", "two dogs"]), ids)
    image, text = encoder(PIXELS, ids)
    assert torch.equal(image.pooled, model.encode_image(PIXELS)) and torch.equal(text.pooled, model.encode_text(ids))
    assert encoder.preprocess.as_dict() | {"mode": "RGB"} == {**model.visual.preprocess_cfg, "size": (32, 32)} | {
        "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)
    }  # fmt: skip
    state = load_file(folder / "open_clip_model.safetensors")
    assert {k: v.tolist() for k, v in open_clip_state(encoder).items()} == {k: v.tolist() for k, v in state.items()}


def test_loaded_weights_can_be_trained_without_touching_the_file(folder: Path, registry: Registry) -> None:
    before = (folder / "open_clip_model.safetensors").read_bytes()
    encoder = load(str(folder), registry=registry)
    assert not any(t.is_meta for t in [*encoder.parameters(), *encoder.buffers()])
    optimizer = torch.optim.SGD(encoder.parameters(), lr=1.0)
    encoder.image(PIXELS).pooled.sum().backward()
    old = encoder.image.tower.proj.detach().clone()
    optimizer.step()
    assert not torch.equal(old, encoder.image.tower.proj)
    assert (folder / "open_clip_model.safetensors").read_bytes() == before


def test_half_precision_files_become_fp32(folder: Path, registry: Registry) -> None:
    file = folder / "open_clip_model.safetensors"
    save_file({k: v.half() for k, v in load_file(file).items()}, file)
    encoder = load(str(folder), registry=registry)
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    assert torch.equal(encoder.image.tower.proj, load_file(file)["visual.proj"].float())


def test_training_checkpoint_of_open_clip(folder: Path, registry: Registry) -> None:
    state = load_file(folder / "open_clip_model.safetensors")
    (folder / "open_clip_model.safetensors").unlink()
    checkpoint = {"epoch": 1, "state_dict": {f"module.{k}": v for k, v in state.items()}}
    torch.save(checkpoint, folder / "open_clip_pytorch_model.bin")
    assert torch.equal(load(str(folder), registry=registry).image.tower.proj, state["visual.proj"])


class Evil:
    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> tuple:
        return Path.touch, (self.flag,)


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.pth", "model.pth"])
def test_code_in_weights_is_refused(folder: Path, tmp_path: Path, registry: Registry, name: str) -> None:
    (folder / "open_clip_model.safetensors").unlink()
    if name.endswith(".safetensors"):
        (folder / name).write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    else:
        torch.save({"state_dict": Evil(tmp_path / "ran")}, folder / name)
    with pytest.raises(InputError, match="was not loaded") as caught:
        load(str(folder), registry=registry)
    assert not (tmp_path / "ran").exists() and "\n" not in str(caught.value) and name in str(caught.value)


def test_damaged_and_missing_weights(folder: Path, registry: Registry) -> None:
    file = folder / "open_clip_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"open_clip_model.safetensors is damaged"):
        load(str(folder), registry=registry)
    file.unlink()
    with pytest.raises(InputError, match=r"open_clip_model.safetensors is missing"):
        load(str(folder), registry=registry)


def change(folder: Path, **keys: dict) -> None:
    file = folder / "open_clip_config.json"
    config = json.loads(file.read_text())
    for dotted, value in keys.items():
        *path, last = dotted.split("__")
        node = config
        for key in path:
            node = node[key]
        if value is None:
            del node[last]
        else:
            node[last] = value
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"preprocess_cfg__size": 48}, r"declares images of \(48, 48\), but the model takes \(32, 32\)"),
        ({"preprocess_cfg__mean": None}, r"declares no preprocess_cfg.mean"),
        ({"preprocess_cfg": {}}, r"declares no preprocess_cfg.mean"),
        ({"model_cfg__vision_cfg__image_size": 64}, r"hold 17 image positions, the declared image size needs 65"),
        ({"model_cfg__text_cfg__layers": 3}, r"text.transformer.resblocks.2.ln_1.weight is missing \(12 in all\)"),
        (
            {"model_cfg__text_cfg__vocab_size": 99},
            r"text.token_embedding.weight is \(49408, 32\) instead of \(99, 32\)",
        ),
        ({"model_cfg__init_logit_bias": -10}, r"logit_bias is missing"),
        ({"model_cfg__multimodal_cfg": {"width": 32}}, r"CoCa"),
        ({"model_cfg__embed_dim": None}, r"no embed_dim"),
        ({"model_cfg": None}, r"is no open_clip configuration"),
    ],
)
def test_mismatches_are_errors(folder: Path, registry: Registry, keys: dict, message: str) -> None:
    change(folder, **keys)
    with pytest.raises(InputError, match=message) as caught:
        load(str(folder), registry=registry)
    assert "\n" not in str(caught.value)


def test_random_architecture_has_open_clips_defaults() -> None:
    encoder = load("open_clip:RN50-quickgelu")
    assert encoder.preprocess.size == (224, 224) and encoder.preprocess.mean[0] == 0.48145466
    assert encoder.data.origin.architecture == "RN50-quickgelu" and encoder.tokenizer(["a"]).shape == (1, 77)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("open_clip:ViT-B-32/openai", r"with QuickGELU.* use open_clip:ViT-B-32-quickgelu/openai"),
        ("open_clip:ViT-B-31", r"unknown open_clip architecture 'ViT-B-31'; did you mean .*ViT-B-32"),
        (
            "open_clip:ViT-B-32-quickgelu/opena",
            r"unknown weights tag of ViT-B-32-quickgelu 'opena'; did you mean openai",
        ),
        ("open_clip:", "names nothing"),
        ("./nowhere", "nothing opens './nowhere'"),
        ("nobody/clip", "unknown model 'nobody/clip'"),
    ],
)
def test_references_that_lead_nowhere(uri: str, message: str, registry: Registry) -> None:
    with pytest.raises(InputError, match=message):
        load(uri, registry=registry)


def test_tag_brings_its_preprocessing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny", CONFIG)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny-quickgelu", {**CONFIG, "quick_gelu": True})
    tag = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bilinear", "resize_mode": "squash"}
    tag |= {"file": str(folder / "open_clip_model.safetensors")}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "Tiny", {"mine": tag, "quick": {**tag, "quick_gelu": True}})
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "Tiny-quickgelu", {"quick": {**tag, "quick_gelu": True}})
    encoder = load("open_clip:Tiny/mine")
    assert encoder.preprocess.mean == (0.5, 0.5, 0.5) and encoder.preprocess.interpolation == "bilinear"
    assert encoder.preprocess.resize_mode == "squash"
    with pytest.raises(InputError, match="use open_clip:Tiny-quickgelu/quick"):
        load("open_clip:Tiny/quick")
    quick = load("open_clip:Tiny-quickgelu/quick").eval()
    with torch.no_grad():
        assert not torch.equal(quick.image(PIXELS).pooled, encoder.eval().image(PIXELS).pooled)


def test_every_quickgelu_mismatch_of_open_clip_has_a_name_to_use() -> None:
    """The advice in the error must be a reference that exists, for every pretrained tag."""
    for arch, tag in open_clip.list_pretrained():
        if advice := openclip.quickgelu_advice(arch, tag):
            other, _, same = advice.removeprefix("open_clip:").partition("/")
            assert same == tag and openclip.quickgelu_advice(other, tag) == ""


def test_hub_repository_from_the_offline_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    repository, commit = cache / "models--someone--tiny", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    encoder = load("hf-hub:someone/tiny")
    assert encoder.data.origin.uri == "hf-hub:someone/tiny" and encoder.preprocess.mean == (0.4, 0.5, 0.6)
    with pytest.raises(InputError, match="hf-hub:someone/else could not be fetched"):
        load("hf-hub:someone/else")


def test_foreign_folder(tmp_path: Path, registry: Registry) -> None:
    with pytest.raises(
        InputError, match=r"expected a folder with clipgraft.json, open_clip_config.json or config.json"
    ):
        load(str(tmp_path), registry=registry)


def test_bpe_tokenizer_is_open_clips() -> None:
    texts = ["a photo of a cat.", "  Two DOGS &amp; a bird  ", "x " * 100]
    assert torch.equal(BpeTokenizer(context_length=20)(texts), open_clip.tokenizer.tokenize(texts, 20))


def test_random_masking_tokenizers_are_refused() -> None:
    with pytest.raises(InputError, match="reduction_mask"):
        tokenizer_for({"tokenizer_kwargs": {"reduction_mask": "random"}})


def test_huggingface_tokenizer_round_trip(tmp_path: Path) -> None:
    TinyTokenizer().save(str(tmp_path))
    texts = ["a photo of a RED circle, and more words than fit into sixteen tokens of a text", "zebra", ""]
    found = tokenizer_for({"hf_tokenizer_name": "tiny", "context_length": 16}, folder=tmp_path)
    assert isinstance(found, HuggingFaceTokenizer) and found.pad_id == 0
    assert torch.equal(found(texts), TinyTokenizer()(texts))
    (tmp_path / "again").mkdir()
    found.save(str(tmp_path / "again"))
    again = HuggingFaceTokenizer(str(tmp_path / "again"), 16)
    assert torch.equal(again(texts), found(texts))


def test_missing_tokenizer_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tokenizer could be read from") as caught:
        HuggingFaceTokenizer(str(tmp_path), 16)(["a"])
    assert "\n" not in str(caught.value)


def test_tiny_clip_is_reproducible_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, two, other = tiny_clip(seed=1), tiny_clip(seed=1), tiny_clip(seed=2)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(one.image.tower.proj, two.image.tower.proj)
    assert not torch.equal(one.image.tower.proj, other.image.tower.proj)


def test_tiny_tokenizer_tells_captions_apart() -> None:
    ids = TinyTokenizer()(["a red circle", "a blue circle", "a red square", "A Red Circle"])
    assert len({tuple(row) for row in ids.tolist()}) == 3 and (ids.argmax(1) == 4).all() and ids.max() == 127
