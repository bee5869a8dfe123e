"""Files that a sha256 pins, and weights that are drawn: nothing is read unseen."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from clipgraft.errors import InputError
from clipgraft.log import RunLog
from clipgraft_diffusion.diva.config import CriticConfig
from clipgraft_diffusion.genhancer.config import LatentConfig
from clipgraft_diffusion.latent import open_vae, vae_problem
from clipgraft_diffusion.unet import diffusion_problems, open_stable_diffusion
from clipgraft_diffusion.weights import Weights, part_sha256, weight_files

WRONG = "0" * 64


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sharded(folder, *, shards=2):
    """The folder's one file as shards with an index, as diffusers writes them."""
    whole = folder / "diffusion_pytorch_model.safetensors"
    state, names = load_file(whole), []
    for k in range(shards):
        part = dict(list(state.items())[k::shards])
        file = f"diffusion_pytorch_model-{k + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file, {"format": "pt"})
        names += [(tensor, file) for tensor in part]
    whole.unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": dict(names)}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def copy(tiny_diffusion, tmp_path):
    return shutil.copytree(tiny_diffusion, tmp_path / "copy")


def problems(where, **more):
    return diffusion_problems(str(where), size=64, noise={}, tokens=None, **more)


def test_the_sha256_of_a_part_is_the_one_that_sha256sum_prints(copy):
    (file,) = weight_files(copy / "unet")
    assert part_sha256([file]) == sha256(file)
    assert weight_files(copy / "text_encoder")[0].name == "model.safetensors"
    sharded(copy / "unet")
    files = weight_files(copy / "unet")
    assert len(files) == 2
    # cd unet && sha256sum *.safetensors | sha256sum
    printed = "".join(f"{sha256(f)}  {f.name}\n" for f in sorted((copy / "unet").glob("*.safetensors")))
    assert part_sha256(files) == hashlib.sha256(printed.encode()).hexdigest()


def test_a_changed_file_is_hashed_again(copy):
    (file,) = weight_files(copy / "vae")
    before = part_sha256([file])
    save_file({k: v + 1 for k, v in load_file(file).items()}, file)
    assert part_sha256([file]) == sha256(file) != before


def test_a_mismatch_is_one_line_with_both_hashes_before_anything_is_read(copy, monkeypatch):
    found = sha256(copy / "unet" / "diffusion_pytorch_model.safetensors")
    assert problems(copy, weights={"unet": Weights(sha256=found)}) == []
    (said,) = problems(copy, weights={"unet": Weights(sha256=WRONG)})
    assert found in said
    assert WRONG in said
    assert "\n" not in said
    monkeypatch.setattr("diffusers.UNet2DConditionModel.from_pretrained", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(InputError, match=f"{found}.*{WRONG}"):
        open_stable_diffusion(str(copy), prompt="", weights={"unet": Weights(sha256=WRONG)})


def test_shards_open_pinned_and_a_changed_shard_is_noticed(copy):
    plain = open_stable_diffusion(str(copy), prompt="")
    sharded(copy / "unet")
    pin = part_sha256(weight_files(copy / "unet"))
    again = open_stable_diffusion(str(copy), prompt="", weights={"unet": Weights(sha256=pin)})
    assert all(torch.equal(a, b) for a, b in zip(plain.unet.parameters(), again.unet.parameters(), strict=True))
    last = weight_files(copy / "unet")[-1]
    save_file({k: v + 1 for k, v in load_file(last).items()}, last)
    with pytest.raises(InputError, match=pin):
        open_stable_diffusion(str(copy), prompt="", weights={"unet": Weights(sha256=pin)})
    last.unlink()
    assert last.name in problems(copy, weights={"unet": Weights()})[0]


def test_the_log_says_the_hash_that_can_be_pinned(copy, capsys):
    parts = {part: Weights() for part in ("unet", "vae", "text_encoder")}
    open_stable_diffusion(str(copy), prompt="", weights=parts, log=RunLog())
    said = capsys.readouterr().err
    for part in parts:
        assert sha256(weight_files(copy / part)[0]) in said
    assert "pinned" not in said


def test_random_weights_need_config_json_alone_and_say_so(copy, capsys):
    for file in copy.rglob("*.safetensors"):
        file.unlink()
    assert "diffusion_pytorch_model.safetensors" in problems(copy, weights={"unet": Weights()})[0]
    parts = {part: Weights(seed=3) for part in ("unet", "vae", "text_encoder")}
    assert problems(copy, weights=parts) == []
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = open_stable_diffusion(str(copy), prompt="a photo", weights=parts, log=RunLog())
    assert torch.equal(torch.get_rng_state(), before)
    assert capsys.readouterr().err.count("random weights (seed 3)") == 3
    again = open_stable_diffusion(str(copy), prompt="a photo", weights=parts)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    assert torch.equal(one.prompt, again.prompt)
    other = open_stable_diffusion(str(copy), prompt="a photo", weights=parts | {"unet": Weights(seed=4)})
    assert not torch.equal(one.unet.conv_in.weight, other.unet.conv_in.weight)
    assert torch.equal(one.vae.encoder.conv_in.weight, other.vae.encoder.conv_in.weight)
    x_t = torch.randn(1, 4, 8, 8)
    assert one(x_t, torch.tensor([5]), torch.randn(1, 3, 16)).isfinite().all()


def test_a_single_model_takes_the_same_settings(copy):
    where = str(copy / "vae")
    pin = sha256(copy / "vae" / "diffusion_pytorch_model.safetensors")
    assert vae_problem(where, None, weights=Weights(sha256=pin)) is None
    assert WRONG in vae_problem(where, None, weights=Weights(sha256=WRONG))
    open_vae(where, None, weights=Weights(sha256=pin))
    (copy / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    one, again = (open_vae(where, None, weights=Weights(seed=0)).encoder.conv_in.weight for _ in range(2))
    assert torch.equal(one, again)


def test_a_directory_has_no_revision_and_an_ambiguous_one_is_refused(copy):
    assert "revision abc" in problems(copy, revision="abc")[0]
    folder = copy / "unet"
    kept = (folder / "diffusion_pytorch_model.safetensors").read_bytes()
    sharded(folder)
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(kept)
    assert "both" in problems(copy, weights={"unet": Weights()})[0]


def test_settings_that_contradict_each_other():
    assert CriticConfig(sha256={"unet": "A" * 64}).part_weights(seed=1) == {
        "unet": Weights(sha256="a" * 64),
        "vae": Weights(),
        "text_encoder": Weights(),
    }
    assert CriticConfig(weights="random").part_weights(seed=1)["vae"] == Weights(seed=1)
    for bad in ({"sha256": {"unet": "abc"}}, {"sha256": {"tokenizer": WRONG}}):
        with pytest.raises(ValueError, match="sha256"):
            CriticConfig(**bad)
    with pytest.raises(ValueError, match="remove one"):
        CriticConfig(weights="random", sha256={"unet": WRONG})
    with pytest.raises(ValueError, match="remove one"):
        LatentConfig(weights="random", sha256=WRONG)


def cached(folder, repository, *, commit, tag, source):
    """``source`` as the Hugging Face cache keeps a repository."""
    root = folder / f"models--{repository.replace('/', '--')}"
    shutil.copytree(source, root / "snapshots" / commit)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / tag).write_text(commit)


def test_a_hugging_face_id_from_the_cache_pinned_by_hash_and_revision(tiny_diffusion, tmp_path, monkeypatch):
    from huggingface_hub import constants

    other = shutil.copytree(tiny_diffusion, tmp_path / "other")
    file = other / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({k: v + 1 for k, v in load_file(file).items()}, file, {"format": "pt"})
    cached(tmp_path / "hub", "some/one", commit="1" * 40, tag="main", source=tiny_diffusion)
    cached(tmp_path / "hub", "some/one", commit="2" * 40, tag="v2", source=other)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pins = {rev: sha256(tmp_path / "hub/models--some--one/snapshots" / c / "unet/diffusion_pytorch_model.safetensors")
            for rev, c in ((None, "1" * 40), ("v2", "2" * 40))}  # fmt: skip
    assert pins[None] != pins["v2"]
    for revision, pin in pins.items():
        assert problems("some/one", revision=revision, weights={"unet": Weights(sha256=pin)}) == []
        assert WRONG in problems("some/one", revision=revision, weights={"unet": Weights(sha256=WRONG)})[0]
        vae = open_vae("some/one", "vae", revision=revision, weights=Weights())
        assert vae.config.latent_channels == 4
        with pytest.raises(InputError, match=WRONG):
            open_vae("some/one", "vae", revision=revision, weights=Weights(sha256=WRONG))
    assert "HF_HUB_OFFLINE" in problems("some/one", revision="v3")[0]
