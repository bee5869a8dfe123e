"""Input that can't work: one clear line each from a dry run, and nothing is written."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image

from clipgraft.checkpoint import write_export
from clipgraft.errors import InputError
from clipgraft.execution import run_recipe
from clipgraft.registry import Registry
from clipgraft.testing.tiny import tiny_clip
from clipgraft_diffusion.crops import Crops

REGISTRY = Registry.discover(allow=["diffusion"])
TRAIN = {"steps": 2, "batch_size": 8, "lr": 1e-3, "warmup": 0}


def pictures(folder, *, side, count=24):
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (side, side + 1), (10 * i, 0, 0)).save(folder / f"{i:02d}.png")
    return f"folder:{folder}"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_export(tiny_clip(), folder / "clip")
    write_export(tiny_clip(image_size=40), folder / "odd")
    pictures(folder / "pictures", side=40)
    return folder


@pytest.fixture
def parts(tiny_diffusion, tmp_path):
    return shutil.copytree(tiny_diffusion, tmp_path / "parts")


def change(file, **settings):
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def dry(recipe, world, out, **more):
    settings = {"model.from": str(world / "clip"), "data.from": f"folder:{world / 'pictures'}", **more}
    return run_recipe(recipe, overrides=settings, out=out / "run", dry_run=True, registry=REGISTRY)


def diva(world, parts, out, **more):
    denoiser = {"from": str(parts), "size": 64, **more.pop("denoiser", {})}
    return dry("diffusion/diva", world, out, denoiser=denoiser, train=TRAIN, **more)


def refused(attempt, said, out):
    with pytest.raises(InputError, match=said) as caught:
        attempt()
    assert "\n" not in str(caught.value)
    assert not (out / "run").exists()


def test_what_fits_passes(world, parts, tmp_path):
    assert diva(world, parts, tmp_path).status == "dry-run"
    assert not (tmp_path / "run").exists()


def test_pictures_smaller_than_a_patch(world, parts, tmp_path):
    small = pictures(tmp_path / "small", side=5)
    refused(
        lambda: diva(world, parts, tmp_path, **{"data.from": small}), "5 x 6 px, smaller than one patch of 8", tmp_path
    )
    refused(lambda: dry("diffusion/genhancer", world, tmp_path, **{"data.from": small}), "one patch of 8 px", tmp_path)
    discrete = {"data.from": small, "codes.size": 4}
    refused(lambda: dry("diffusion/genhancer-discrete", world, tmp_path, **discrete), "one patch of 8 px", tmp_path)
    assert diva(world, parts, tmp_path, **{"data.from": small, "data.max_bad": 1.0}).status == "dry-run"


def test_a_single_small_picture_counts_as_unreadable_in_training(world, tmp_path):
    from clipgraft.data import open_source
    from clipgraft.data.base import BadSample

    reference = pictures(tmp_path / "mixed", side=40, count=3)
    Image.new("RGB", (40, 4)).save(tmp_path / "mixed" / "01.png")
    crops = Crops(open_source(reference, registry=REGISTRY), size=64, area=None, seed=0, smallest=8)
    assert crops[0].image.shape == (3, 64, 64)
    with pytest.raises(BadSample, match="smaller than one patch of 8 px"):
        crops[1]


def test_data_that_is_not_there(world, parts, tmp_path):
    refused(lambda: diva(world, parts, tmp_path, **{"data.from": "folder:no-such"}), "no-such", tmp_path)


def test_a_unet_whose_cross_attention_does_not_fit(world, parts, tmp_path):
    change(parts / "unet" / "config.json", cross_attention_dim=24)
    refused(
        lambda: diva(world, parts, tmp_path),
        "cross-attention of width 24, but its text encoder's states have 16",
        tmp_path,
    )
    assert diva(world, parts, tmp_path, **{"condition.combine": "none"}).status == "dry-run"
    change(parts / "unet" / "config.json", cross_attention_dim=[16, 16])
    refused(lambda: diva(world, parts, tmp_path), "one width", tmp_path)


def test_a_unet_of_another_autoencoder_or_with_more_conditions(world, parts, tmp_path):
    change(parts / "unet" / "config.json", in_channels=9)
    refused(lambda: diva(world, parts, tmp_path), "takes 9 channels, but its autoencoder gives 4", tmp_path)
    change(parts / "unet" / "config.json", in_channels=4, addition_embed_type="text_time")
    refused(lambda: diva(world, parts, tmp_path), "addition_embed_type text_time", tmp_path)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part(world, parts, tmp_path, part):
    shutil.rmtree(parts / part)
    refused(lambda: diva(world, parts, tmp_path), f"holds no diffusers {part.replace('_', ' ')}", tmp_path)


def test_weights_that_are_missing_or_not_the_pinned_ones(world, parts, tmp_path):
    file = parts / "vae" / "diffusion_pytorch_model.safetensors"
    pinned = {"denoiser": {"sha256": {"vae": "0" * 64}}}
    refused(lambda: diva(world, parts, tmp_path, **pinned), f"the vae of .* has the sha256 .* say {'0' * 64}", tmp_path)
    file.unlink()
    refused(lambda: diva(world, parts, tmp_path), "the vae of .* has no diffusion_pytorch_model.safetensors", tmp_path)
    assert diva(world, parts, tmp_path, denoiser={"weights": "random"}).status == "dry-run"
    refused(
        lambda: diva(world, parts, tmp_path, denoiser={"weights": "random", "sha256": {"vae": "0" * 64}}),
        "remove one of the two",
        tmp_path,
    )


def test_a_config_that_is_no_json(world, parts, tmp_path):
    (parts / "unet" / "config.json").write_text("{")
    refused(lambda: diva(world, parts, tmp_path), "no JSON object", tmp_path)


def test_a_latent_that_can_not_be_packed(world, parts, tmp_path):
    odd = {"model.from": str(world / "odd"), "latent": {"kind": "vae", "vae": str(parts), "subfolder": "vae"}}
    refused(lambda: dry("diffusion/genhancer", world, tmp_path, **odd), "multiples of 16", tmp_path)
    config = parts / "vae" / "config.json"
    blocks = {"block_out_channels": [4, 4], "down_block_types": ["DownEncoderBlock2D"] * 2}
    change(config, **blocks, up_block_types=["UpDecoderBlock2D"] * 2)
    assert dry("diffusion/genhancer", world, tmp_path, **odd).status == "dry-run"  # halves once: multiples of 4


def test_a_vae_that_is_missing_or_none(world, parts, tmp_path):
    gone = {"latent": {"kind": "vae", "vae": str(tmp_path / "nowhere")}}
    refused(lambda: dry("diffusion/genhancer", world, tmp_path, **gone), "holds no diffusers autoencoder", tmp_path)
    other = {"latent": {"kind": "vae", "vae": str(parts / "unet"), "subfolder": None}}
    refused(lambda: dry("diffusion/genhancer", world, tmp_path, **other), "not a AutoencoderKL", tmp_path)
    bare = {"latent": {"kind": "vae", "vae": str(parts), "subfolder": "vae"}}
    (parts / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    refused(lambda: dry("diffusion/genhancer", world, tmp_path, **bare), "no diffusion_pytorch_model", tmp_path)


def test_a_cache_without_anything_to_keep(world, parts, tmp_path):
    tokens = {"latent": {"kind": "tokens", "cache": str(tmp_path)}}
    refused(lambda: dry("diffusion/genhancer", world, tmp_path, **tokens), "kind to vae", tmp_path)
    codes = {"codes": {"kind": "tokens", "cache": str(tmp_path)}}
    refused(lambda: dry("diffusion/genhancer-discrete", world, tmp_path, **codes), "kind to vq", tmp_path)


def test_checkpointing_and_sizes(world, parts, tmp_path):
    assert diva(world, parts, tmp_path, checkpointing=True).status == "dry-run"
    refused(lambda: diva(world, parts, tmp_path, denoiser={"size": 8}), "multiple of 16, such as 16", tmp_path)


def test_random_parts_and_recomputed_activations_run(world, parts, tmp_path):
    for file in parts.rglob("*.safetensors"):
        file.unlink()
    settings = {"model.from": str(world / "clip"), "data.from": f"folder:{world / 'pictures'}", "train": TRAIN}
    settings |= {"denoiser": {"from": str(parts), "size": 64, "weights": "random"}, "evaluate.retention": "none"}
    finished = []
    for name, checkpointing in (("plain", False), ("less", True)):
        out = tmp_path / name
        run_recipe("diffusion/diva", overrides=settings | {"checkpointing": checkpointing}, out=out, registry=REGISTRY)
        finished.append((out / "export" / "open_clip_model.safetensors").read_bytes())
        assert "random weights (seed 0)" in (out / "log.txt").read_text()
    assert finished[0] == finished[1]


def flux(folder, *, channels=32, **sizes):
    from diffusers import FluxTransformer2DModel

    settings = {
        "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 16, "pooled_projection_dim": 16, "guidance_embeds": True, "axes_dims_rope": (4, 6, 6),
    }  # fmt: skip
    torch.manual_seed(5)
    FluxTransformer2DModel(in_channels=channels, **{**settings, **sizes}).save_pretrained(folder / "transformer")
    return str(folder)


SIZES = {"condition": {"vec_dim": 16, "txt_dim": 16}}


def blocks(where, **more):
    return SIZES | {"denoiser": {"from": where, "width": 32, "heads": 2, "depth": 1, "single_depth": 1, **more}}


def test_blocks_to_start_from(world, tmp_path):
    from safetensors.torch import load_file

    where = flux(tmp_path / "flux")
    settings = {"model.from": str(world / "clip"), "data.from": f"folder:{world / 'pictures'}"}
    settings |= {"evaluate.retention": "none", **blocks(where, positions=0)}
    settings |= {"generator.train": TRAIN | {"lr": 1e-9, "weight_decay": 0}, "clip.train": TRAIN}
    run_recipe("diffusion/genhancer", overrides=settings, out=tmp_path / "run", registry=REGISTRY)
    left = load_file(tmp_path / "run" / "stages/00-generator/result/denoiser.safetensors")
    begun = load_file(tmp_path / "flux" / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, weight in begun.items():
        torch.testing.assert_close(left[f"flux.{name}"], weight, atol=1e-6, rtol=0)
    assert "the transformer of" in (tmp_path / "run" / "log.txt").read_text()


def test_blocks_that_do_not_fit(world, tmp_path):
    def go(where, out=tmp_path, **more):
        return dry("diffusion/genhancer", world, out, **blocks(where, **{"positions": 0, **more}))

    assert go(flux(tmp_path / "good")).status == "dry-run"
    refused(lambda: go(str(tmp_path / "good"), positions=4), "set it to 0", tmp_path)
    refused(lambda: go(str(tmp_path / "good"), sha256="0" * 64), "has the sha256", tmp_path)
    refused(lambda: go(str(tmp_path / "good"), guidance=None), "guidance_embeds True, denoiser.guidance", tmp_path)
    refused(lambda: go(flux(tmp_path / "deep", num_layers=2)), "num_layers 2, denoiser.depth makes it 1", tmp_path)
    refused(lambda: go(flux(tmp_path / "told", joint_attention_dim=24)), "condition.txt_dim makes it 16", tmp_path)
    refused(lambda: go(str(tmp_path / "nowhere")), "holds no diffusers transformer", tmp_path)
