"""Official checkpoints: two tables become one, the export is a CLIP of open_clip's."""

import json

import pytest
import torch
from typer.testing import CliRunner

from clipgraft.checkpoint import open_export, read_manifest
from clipgraft.encoders.openclip import open_clip_state
from clipgraft.encoders.tokenizers import BpeTokenizer
from clipgraft.errors import InputError
from clipgraft.testing.tiny import tiny_clip
from clipgraft_llm.commands import app
from clipgraft_llm.longclip.graft import StretchPositions
from clipgraft_llm.longclip.official import architecture, merged_state, official_encoder

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A tiny model as the official code saves it: two tables of 248, one of them with rows that nobody reads."""
    encoder = tiny_clip(context=77, vocab=49408, width=16, depth=1).eval()
    encoder.data.tokenizer = BpeTokenizer(77)
    config = encoder.data.model_config
    del config["text_cfg"]["hf_tokenizer_name"]
    graft = StretchPositions()
    graft.apply(encoder)
    graft.merge(encoder)
    state = open_clip_state(encoder)
    table = state["positional_embedding"]
    state["positional_embedding_res"] = torch.cat([torch.zeros(20, 16), table[20:]])
    state["positional_embedding"] = torch.cat([table[:20], torch.ones(228, 16)])
    file = tmp_path_factory.mktemp("official") / "longclip.pt"
    torch.save({name: value.half() for name, value in state.items()}, file)
    return file, config, table


def test_the_tables_are_merged_where_official_training_splits_them(official):
    file, config, table = official
    encoder = official_encoder(file, config=config)
    assert torch.equal(encoder.text.tower.positional_embedding, table.half().float())
    assert encoder.tokenizer.context_length == encoder.text.context_length == 248
    assert encoder.preprocess.mean[0] == pytest.approx(0.48145466)


def test_the_command_writes_what_open_clip_alone_opens(official, tmp_path, monkeypatch):
    import open_clip

    file, config, _ = official
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: config if name == "tiny" else None)
    words = ["import-long-clip", str(file), "--out", str(tmp_path / "out"), "--arch", "tiny", "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["context"] == 248
    manifest = read_manifest(tmp_path / "out")
    assert manifest["level"] == "L0" and manifest["lineage"][0]["imported"] == "longclip.pt"
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    ids = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")(["a cat " * 60])
    with torch.no_grad():
        ours = open_export(tmp_path / "out").text(ids).pooled
        assert torch.allclose(model.eval().encode_text(ids), ours, atol=1e-5)
    done = CliRunner().invoke(app, [*words[:4], "--arch", "tin"])
    assert done.exit_code != 0 and isinstance(done.exception, InputError)


def test_architectures_are_known_by_their_shapes():
    for shape, name in (((768, 3, 16, 16), "ViT-B-16-quickgelu"), ((1024, 3, 14, 14), "ViT-L-14-quickgelu")):
        assert architecture({"visual.conv1.weight": torch.empty(shape, device="meta")}, where="f") == name
    with pytest.raises(InputError, match="--arch"):
        architecture({}, where="f")


def test_other_checkpoints_are_refused(tmp_path):
    table = torch.zeros(248, 4)
    with pytest.raises(InputError, match="no positional_embedding_res"):
        merged_state({"positional_embedding": table}, where="f")
    with pytest.raises(InputError, match="expected two alike"):
        merged_state({"positional_embedding": table, "positional_embedding_res": table[1:]}, where="f")
    with pytest.raises(InputError, match="missing"):
        official_encoder(tmp_path / "gone.pt")
