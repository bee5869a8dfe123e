"""Checkpoints: every real format under the same names, lazily, and what is wrong with a file in one line."""

import json
import re

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from clipgraft.checkpoint import write_export
from clipgraft.encoders.huggingface import write_huggingface
from clipgraft.encoders.openclip import custom_layout, open_clip_state
from clipgraft.errors import InputError
from clipgraft.testing.tiny import tiny_clip
from clipgraft_merging.weights.checkpoints import open_checkpoint
from clipgraft_merging.weights.families import block_of, fuse, kind_of, parts_of, split


def same(checkpoint, state):
    """Whether a checkpoint holds exactly the tensors of ``state``, by canonical name."""
    assert checkpoint.keys() == sorted(state)
    for key, tensor in state.items():
        assert checkpoint.shape(key) == tuple(tensor.shape) and checkpoint.dtype(key) == tensor.dtype
        assert torch.equal(checkpoint.tensor(key), tensor), key
    return True


def canonical(encoder):
    return custom_layout({k: v.detach() for k, v in open_clip_state(encoder).items()})


def open_clip_folder(encoder, folder):
    """As open_clip writes it: no manifest of ours."""
    write_export(encoder, folder)
    (folder / "clipgraft.json").unlink()
    return folder


def sharded(folder, into, *, count=3):
    """A folder's model.safetensors in shards with transformers' index."""
    into.mkdir()
    state = load_file(folder / "model.safetensors")
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    places = {key: names[i % count] for i, key in enumerate(sorted(state))}
    for name in names:
        save_file({k: state[k] for k in places if places[k] == name}, into / name, {"format": "pt"})
    (into / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    for file in folder.iterdir():
        if file.name != "model.safetensors":
            (into / file.name).write_bytes(file.read_bytes())
    return into


@pytest.mark.parametrize("kind", ["vit", "custom-text"])
def test_every_format_of_one_model_holds_the_same_canonical_tensors(kind, tmp_path):
    encoder = tiny_clip(3, kind=kind)
    state = canonical(encoder)
    write_export(encoder, tmp_path / "ours")
    folder = open_clip_folder(encoder, tmp_path / "open_clip")
    write_huggingface(encoder, tmp_path / "hf")
    refs = [
        tmp_path / "ours", folder, folder / "open_clip_model.safetensors", tmp_path / "hf",
        tmp_path / "hf" / "model.safetensors", sharded(tmp_path / "hf", tmp_path / "shards"), f"local-dir:{folder}",
    ]  # fmt: skip
    for ref in refs:
        assert same(open_checkpoint(ref), state), ref


def test_transformers_own_sharded_save_is_read(tmp_path):
    from transformers import CLIPModel

    encoder = tiny_clip(4)
    write_huggingface(encoder, tmp_path / "hf")
    model = CLIPModel.from_pretrained(tmp_path / "hf")
    model.save_pretrained(tmp_path / "again", max_shard_size="60KB")
    (tmp_path / "again" / "preprocessor_config.json").write_bytes(
        (tmp_path / "hf" / "preprocessor_config.json").read_bytes()
    )
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 2
    assert same(open_checkpoint(tmp_path / "again"), canonical(encoder))


def test_siglip_is_one_model_in_our_layout_and_in_hugging_faces(tmp_path):
    encoder = tiny_clip(5, kind="siglip-timm")
    write_export(encoder, tmp_path / "ours")
    write_huggingface(encoder, tmp_path / "hf")
    ours, theirs = open_checkpoint(tmp_path / "ours"), open_checkpoint(tmp_path / "hf")
    assert same(theirs, {key: ours.tensor(key) for key in ours.keys()})  # noqa: SIM118
    assert ours.facts.reason and theirs.facts.reason


def test_a_run_directory_is_its_export_and_one_without_says_how_to_finish_it(tmp_path):
    encoder = tiny_clip(6)
    write_export(encoder, tmp_path / "run" / "export")
    (tmp_path / "run" / "status.json").write_text("{}")
    assert same(open_checkpoint(tmp_path / "run"), canonical(encoder))
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "status.json").write_text("{}")
    with pytest.raises(InputError, match="finish it with clipgraft resume"):
        open_checkpoint(tmp_path / "half")


def test_a_registered_encoder_is_a_checkpoint():
    pytest.importorskip("clipgraft_toyworld")
    from clipgraft.encoders import load

    checkpoint = open_checkpoint("toyworld/clip")
    assert same(checkpoint, canonical(load("toyworld/clip")))
    assert checkpoint.data.tokenizer is not None and len(checkpoint.sha256) == 64


def test_half_precision_is_read_as_it_is(tmp_path):
    encoder = tiny_clip(7)
    write_export(encoder, tmp_path / "half", dtype=torch.float16)
    checkpoint = open_checkpoint(tmp_path / "half")
    assert {checkpoint.dtype(k) for k in checkpoint.keys()} == {torch.float16}  # noqa: SIM118
    assert same(checkpoint, {k: v.half() for k, v in canonical(encoder).items()})


def test_q_k_v_split_and_fuse_round_trip_exactly():
    for key, rows, count in (
        ("visual.transformer.resblocks.0.attn.in_proj_weight", 96, 3), ("visual.trunk.blocks.1.attn.qkv.bias", 96, 3),
        ("visual.trunk.attn_pool.kv.weight", 64, 2), ("visual.proj", 32, 1),
    ):  # fmt: skip
        x = torch.randn(rows, 5)
        parts = split(key, x)
        assert len(parts) == parts_of(key) == count
        assert torch.equal(fuse(key, parts), x)
    with pytest.raises(InputError, match="no stack of 3"):
        split("text.transformer.resblocks.0.attn.in_proj_weight", torch.zeros(10, 2))


def test_hugging_faces_separate_q_k_v_are_the_parts_of_the_fused_one(tmp_path):
    write_huggingface(tiny_clip(8), tmp_path / "hf")
    raw = load_file(tmp_path / "hf" / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "hf")
    key = "visual.transformer.resblocks.1.attn.in_proj_weight"
    for part, name in zip(split(key, checkpoint.tensor(key)), "qkv", strict=True):
        assert torch.equal(part, raw[f"vision_model.encoder.layers.1.self_attn.{name}_proj.weight"])


@pytest.mark.parametrize(
    "arch", ["ViT-B-32", "RN50", "ViT-B-16-SigLIP", "roberta-ViT-B-32", "convnext_base", "EVA02-B-16", "MobileCLIP-S1"]
)
def test_the_table_knows_every_tensor_of_open_clips_families(arch):
    config = open_clip.get_model_config(arch)
    assert config is not None
    config.get("text_cfg", {}).pop("hf_model_name", None) if arch != "roberta-ViT-B-32" else None
    if arch == "roberta-ViT-B-32":
        pytest.importorskip("transformers")
        names = {"text.transformer.embeddings.word_embeddings.weight": (9, 4), "text.proj.0.weight": (4, 4)}
        names |= {"text.transformer.encoder.layer.0.attention.self.query.weight": (4, 4)}
        names |= {"text.transformer.embeddings.LayerNorm.weight": (4,)}
    else:
        with torch.device("meta"):
            model = open_clip.model.CustomTextCLIP(**{k: v for k, v in config.items() if k != "custom_text"})
        names = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    kinds = {key: kind_of(key, shape) for key, shape in names.items()}
    for key, kind in kinds.items():
        if kind in ("matrix", "fused_qkv"):
            assert len(names[key]) == 2 or key.endswith("bias"), (key, names[key])
        if kind == "matrix":
            assert not re.search(r"norm|ln_|embed(ding|dings)?\.", key) or "patch_embed" in key or "proj" in key, key
        if kind == "vector":
            assert len(names[key]) <= 1 or key.endswith(("gamma", "bias")), (key, names[key])


def test_kinds_of_the_tensors_that_are_no_layers_weight():
    expected = {
        "visual.proj": ("matrix", (8, 4)), "text.text_projection": ("matrix", (8, 4)), "logit_scale": ("scalar", ()),
        "visual.class_embedding": ("embedding", (8,)), "text.positional_embedding": ("embedding", (16, 8)),
        "visual.conv1.weight": ("embedding", (8, 3, 4, 4)), "visual.bn1.num_batches_tracked": ("skip", ()),
        "visual.transformer.resblocks.0.attn.in_proj_bias": ("fused_qkv", (24,)),
        "visual.ln_post.weight": ("vector", (8,)),
        "visual.transformer.resblocks.0.mlp.c_fc.weight": ("matrix", (32, 8)),
    }  # fmt: skip
    assert {key: kind_of(key, shape) for key, (_, shape) in expected.items()} == {k: v[0] for k, v in expected.items()}
    with pytest.raises(InputError, match="no row of the table"):
        kind_of("visual.mystery", (3, 3))
    assert block_of("visual.transformer.resblocks.3.mlp.c_fc.weight") == "visual.3"
    assert block_of("text.transformer.resblocks.11.ln_1.bias") == "text.11"
    assert (block_of("visual.proj"), block_of("logit_scale")) == ("visual", "scale")


def test_a_truncated_file_is_named(tmp_path):
    folder = open_clip_folder(tiny_clip(0), tmp_path / "a")
    file = folder / "open_clip_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"open_clip_model\.safetensors is truncated, damaged"):
        open_checkpoint(folder)
    file.write_bytes(b"")
    with pytest.raises(InputError, match=r"open_clip_model\.safetensors is truncated, damaged"):
        open_checkpoint(file)


def test_a_changed_export_is_refused_by_its_hash(tmp_path):
    write_export(tiny_clip(0), tmp_path / "a")
    file = tmp_path / "a" / "open_clip_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match="contents changed"):
        open_checkpoint(tmp_path / "a")


def test_a_missing_shard_a_strange_index_and_other_files_are_refused(tmp_path):
    write_huggingface(tiny_clip(0), tmp_path / "hf")
    shards = sharded(tmp_path / "hf", tmp_path / "shards")
    (shards / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00003\.safetensors is missing"):
        open_checkpoint(shards)
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=r"no \.safetensors file"):
        open_checkpoint(tmp_path / "model.bin")
    with pytest.raises(InputError, match="missing"):
        open_checkpoint(tmp_path / "nothing.safetensors")
    with pytest.raises(InputError):
        open_checkpoint(str(tmp_path / "no-such-folder"))


def test_a_weights_file_alone_has_no_configuration(tmp_path):
    folder = open_clip_folder(tiny_clip(0), tmp_path / "a")
    checkpoint = open_checkpoint(folder / "open_clip_model.safetensors")
    with pytest.raises(InputError, match="give the folder it belongs to"):
        _ = checkpoint.data


def test_a_tensor_with_two_names_is_read_by_both(tmp_path):
    x = torch.randn(3, 2)
    state, second = {"visual.a.weight": x, "visual.c.weight": x + 1}, {"visual.b.weight": "visual.a.weight"}
    save_file(state, tmp_path / "t.safetensors", second)
    checkpoint = open_checkpoint(tmp_path / "t.safetensors")
    assert checkpoint.keys() == ["visual.a.weight", "visual.b.weight", "visual.c.weight"]
    assert checkpoint.aliases == {"visual.b.weight": "visual.a.weight"}
    assert torch.equal(checkpoint.tensor("visual.b.weight"), x)
