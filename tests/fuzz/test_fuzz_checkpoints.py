"""Model folders with anything wrong in any of their files: an encoder, or one line that says what is wrong."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from clipgraft import files
from clipgraft.checkpoint import write_export
from clipgraft.encoders import load
from clipgraft.testing.tiny import tiny_clip

pytestmark = [pytest.mark.fuzz, pytest.mark.timeout(3600)]
many, some, few = (settings.get_profile(f"fuzz-{name}") for name in ("many", "some", "few"))

JSONS: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.sampled_from([0, -1, 1, 2, 3, 7, 10**6, 10**12, 2**63, 10**400, 0.5, -0.0, float("nan"), float("inf")]),
        st.sampled_from(
            ["", "quick_gelu", "tiny", "../x", "hf-hub:a/b", "x" * 300, "core/resize-positions", "\0", "\ud800"]
        ),
        st.text(max_size=6),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=4,
)


def paths(value: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The place of everything inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [before, *(p for key, item in inner for p in paths(item, (*before, key)))]


@st.composite
def changed(draw: st.DrawFn, document: Any) -> Any:
    """``document`` with one to three of its values replaced, removed or added."""
    document = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(paths(document)[1:] or [()]))
        if not place:
            return draw(JSONS)
        at = document
        for key in place[:-1]:
            at = at[key]
        if draw(st.booleans()) or isinstance(at, list):
            at[place[-1]] = draw(JSONS)
        elif draw(st.booleans()):
            del at[place[-1]]
        else:
            at[draw(st.sampled_from([*KEYS, place[-1] + "x"]))] = draw(JSONS)
    return document


KEYS = (
    "layers", "width", "heads", "head_width", "patch_size", "image_size", "context_length", "vocab_size", "embed_dim",
    "custom_text", "quick_gelu", "timm_model_name", "timm_kwargs", "hf_model_name", "hf_tokenizer_name", "pool_type",
    "tokenizer_kwargs", "tokenizer_mode", "init_logit_bias", "norm_kwargs", "act_kwargs", "mlp_ratio",
    "attentional_pool", "multimodal_cfg", "nonscalar_logit_scale",
    "output_tokens", "size", "mean", "std", "interpolation", "resize_mode",
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A tiny CLIP as our export, as open_clip's folder and as transformers' folder, an unmergeable one besides."""
    from clipgraft.encoders.huggingface import write_huggingface

    folder = tmp_path_factory.mktemp("models")
    write_export(tiny_clip(), folder / "export")
    shutil.copytree(folder / "export", folder / "open_clip")
    (folder / "open_clip" / "clipgraft.json").unlink()
    write_huggingface(tiny_clip(), folder / "huggingface")
    write_export(tiny_clip(kind="siglip-timm"), folder / "own")
    return folder


def fresh(arena: Any, models: Path, kind: str) -> Path:
    target = arena.work / "model"
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(models / kind, target))


def check(arena: Any, folder: Path) -> None:
    """Open it, and use it as far as it opens."""

    def attempt() -> None:
        encoder = load(str(folder)).eval()
        encoder.tokenizer(["a red circle"])
        assert encoder.preprocess.size[0] > 0

    arena.call(attempt)


JSON_FILES = [
    ("open_clip", "open_clip_config.json"), ("huggingface", "config.json"), ("huggingface", "preprocessor_config.json"),
    ("open_clip", "tokenizer_config.json"), ("open_clip", "tokenizer.json"), ("export", "clipgraft.json"),
    ("own", "clipgraft.json"),
]  # fmt: skip


@many
@given(data=st.data(), which=st.sampled_from(JSON_FILES))
def test_any_change_of_a_configuration_is_noticed_or_harmless(arena, models, data, which):
    kind, name = which
    folder = fresh(arena, models, kind)
    if not (folder / name).exists():
        return
    document = data.draw(changed(json.loads((folder / name).read_text("utf-8"))))
    (folder / name).write_text(json.dumps(document), "utf-8")
    check(arena, folder)


@some
@given(
    kind=st.sampled_from(["open_clip", "huggingface", "export"]),
    edits=st.lists(st.tuples(st.integers(0, 20_000), st.binary(min_size=1, max_size=9)), max_size=4),
    cut=st.one_of(st.none(), st.integers(0, 20_000)),
    suffix=st.sampled_from([".safetensors", ".bin", ".pth"]),
)
def test_damaged_weights_are_refused_or_read(arena, models, kind, edits, cut, suffix):
    folder = fresh(arena, models, kind)
    file = next(folder.glob("*.safetensors"))
    if suffix == ".bin" or suffix == ".pth":
        from safetensors.torch import load_file

        state = load_file(file)
        file.unlink()
        file = folder / f"open_clip_pytorch_model{suffix}"
        torch.save(state, file, _use_new_zipfile_serialization=suffix == ".bin")
    content = bytearray(file.read_bytes())
    for place, value in edits:
        content[place : place + len(value)] = value
    file.write_bytes(content[:cut])
    if kind == "export":  # an attacker knows how to hash
        manifest = json.loads((folder / "clipgraft.json").read_text("utf-8"))
        entry = {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        manifest["files"] = {name: entry if name == file.name else was for name, was in manifest["files"].items()}
        (folder / "clipgraft.json").write_text(json.dumps(manifest), "utf-8")
    check(arena, folder)


@some
@given(
    header=st.one_of(JSONS.map(lambda v: json.dumps(v).encode("utf-8", "backslashreplace")), st.binary(max_size=80)),
    size=st.one_of(st.none(), st.integers(0, 2**64 - 1)),
    body=st.binary(max_size=64),
)
def test_any_header_is_refused_or_read(arena, header, size, body):
    from clipgraft.encoders.openclip import read_weights

    file = arena.work / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(header) if size is None else size) + header + body)
    arena.call(lambda: read_weights(file))


@some
@given(
    drop=st.lists(st.integers(0, 60), max_size=2),
    dtype=st.sampled_from([torch.float16, torch.int64, torch.float64, torch.bool]),
    shape=st.lists(st.integers(0, 5), max_size=3),
    place=st.integers(0, 60),
)
def test_tensors_that_are_missing_or_of_another_shape_are_named(arena, models, drop, dtype, shape, place):
    folder = fresh(arena, models, "open_clip")
    file = folder / "open_clip_model.safetensors"
    from safetensors.torch import load_file

    state = {key: value.clone() for key, value in load_file(file).items()}
    names = sorted(state)
    state[names[place % len(names)]] = torch.ones(shape, dtype=dtype)
    for k in drop:
        state.pop(names[k % len(names)], None)
    save_file(state, file)
    check(arena, folder)


@some
@given(manifest=JSONS, more=st.dictionaries(st.sampled_from(["a", "../a", "/etc/passwd", "a\0"]), JSONS, max_size=2))
def test_any_manifest_of_hashes_is_whole_or_not(arena, manifest, more):
    folder = arena.work / "state"
    folder.mkdir(exist_ok=True)
    (folder / "a").write_text("a", "utf-8")
    for document in (manifest, {"files": manifest}, {"files": more}):
        (folder / files.MANIFEST).write_text(json.dumps(document), "utf-8")
        arena.call(lambda: files.verify(folder))


@some
@given(ids=JSONS, where=st.sampled_from(["metadata", "file"]), shape=st.lists(st.integers(0, 4), max_size=3))
def test_any_embeddings_are_read_or_refused(arena, ids, where, shape):
    from clipgraft.data.sampling import read_embeddings

    file = arena.work / "e.safetensors"
    text = json.dumps(ids)
    save_file({"embeddings": torch.ones(shape)}, file, {"ids": text} if where == "metadata" else None)
    (arena.work / "e.json").write_text(text, "utf-8", "surrogatepass")
    arena.call(lambda: read_embeddings(file))
