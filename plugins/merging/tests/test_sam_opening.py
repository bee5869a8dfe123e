"""Opening a SAM: transformers' directories, what is wrong with them in one line, and the pinned hash."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from clipgraft import files
from clipgraft.errors import InputError
from clipgraft.registry import Registry
from clipgraft_merging.sam.opening import open_sam, sam_problem, sam_settings
from clipgraft_merging.sam.segmenter import open_segmenter
from clipgraft_merging.sam.settings import SamSettings

BARE = Registry.discover(allow=["merging"])


def test_a_directory_opens_with_its_own_sizes_and_normalisation(sam_folder, sam_sizes, sam_model, tmp_path):
    folder = tmp_path / "sam"
    shutil.copytree(sam_folder, folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"size": {"longest_edge": 64}, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]})
    )
    parts = open_sam(str(folder), registry=BARE)
    assert SamSettings.of(parts.config) == sam_sizes and sam_settings(str(folder), registry=BARE) == sam_sizes
    assert parts.preprocess.mean == (0.1, 0.2, 0.3) and parts.preprocess.size == (64, 64)
    assert open_sam(str(sam_folder), registry=BARE).preprocess.std == (0.229, 0.224, 0.225)
    for name, tensor in sam_model.vision_encoder.state_dict().items():
        assert torch.equal(parts.tower.encoder.state_dict()[name], tensor)
    masks = open_segmenter(str(folder), registry=BARE)
    embedded = masks.embed(torch.rand(1, 3, 64, 64))
    assert masks.masks(embedded, boxes=torch.tensor([[[1.0, 2, 30, 40]]])).logits.shape == (1, 1, 3, 32, 32)


def test_half_precision_is_read_as_full(sam_model, tmp_path):
    sam_model.half().save_pretrained(tmp_path / "half")
    assert {p.dtype for p in open_sam(str(tmp_path / "half"), registry=BARE).tower.parameters()} == {torch.float32}


def test_a_pinned_hash_is_compared(sam_folder):
    right = files.sha256_of(sam_folder / "model.safetensors")
    open_sam(str(sam_folder), sha256=right, registry=BARE)
    with pytest.raises(InputError, match=f"has the sha256 {right}, the settings say 00"):
        open_sam(str(sam_folder), sha256="00", registry=BARE)


def test_what_is_wrong_is_one_line(sam_folder, tmp_path):
    def broken(name, change):
        shutil.copytree(sam_folder, tmp_path / name)
        change(tmp_path / name)
        return str(tmp_path / name)

    without = broken("no-weights", lambda f: (f / "model.safetensors").unlink())
    with pytest.raises(InputError, match=r"has no model\.safetensors; no other weights are read"):
        open_sam(without, registry=BARE)
    assert "no model.safetensors" in sam_problem(without, registry=BARE)
    with pytest.raises(InputError, match=r"has no config.json"):
        open_sam(str(tmp_path), registry=BARE)
    other = broken("other", lambda f: (f / "config.json").write_text('{"model_type": "clip"}'))
    with pytest.raises(InputError, match="a model of type 'clip', not 'sam'"):
        open_sam(other, registry=BARE)

    def cut(folder):
        from safetensors.torch import load_file, save_file

        state = load_file(folder / "model.safetensors")
        state.pop("vision_encoder.pos_embed")
        save_file(state, folder / "model.safetensors", {"format": "pt"})

    with pytest.raises(InputError, match=r"lacks vision_encoder.pos_embed \(1 tensors in all\)"):
        open_sam(broken("cut", cut), registry=BARE)
    damaged = broken("damaged", lambda f: (f / "model.safetensors").write_bytes(b"nothing"))
    with pytest.raises(InputError, match="has damaged weights"):
        open_sam(damaged, registry=BARE)
    with pytest.raises(InputError, match="is neither a directory nor a Hugging Face id"):
        open_sam("nothing", registry=BARE)
    with pytest.raises(InputError, match="has no revision"):
        open_sam(str(sam_folder), revision="main", registry=BARE)
    assert sam_problem(str(sam_folder), registry=BARE) is None


def test_only_square_pictures_and_patches():
    with pytest.raises(InputError, match="only square ones"):
        SamSettings.of({"vision_config": {"image_size": [64, 32]}})


@pytest.mark.slow
def test_the_sizes_of_sam_vit_base_load_from_a_directory_in_its_format(tmp_path):
    torch.manual_seed(0)
    SamSettings().model().half().save_pretrained(tmp_path / "sam-vit-base")
    parts = open_sam(str(tmp_path / "sam-vit-base"), registry=BARE)
    with torch.no_grad():
        found = parts.tower.tokens(torch.randn(1, 3, 224, 224))
    assert found.tokens.shape == (1, 196, 768) and found.grid == (14, 14)
