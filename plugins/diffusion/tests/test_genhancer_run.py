"""The recipe as a user runs it: from a folder of pictures to a directory that stock open_clip opens."""

from __future__ import annotations

import json
import shutil

import open_clip
import pytest
import torch
from PIL import Image

from clipgraft.checkpoint import open_export, write_export
from clipgraft.errors import InputError
from clipgraft.execution import run_recipe
from clipgraft.registry import Registry
from clipgraft.testing.tiny import tiny_clip

REGISTRY = Registry.discover(allow=["diffusion"])
SMALL = {
    "condition": {"vec_dim": 16, "txt_dim": 16},
    "denoiser": {"width": 32, "heads": 2, "depth": 1, "single_depth": 1, "positions": 4},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny CLIP directory, another tower, and 24 pictures in three class folders."""
    folder = tmp_path_factory.mktemp("world")
    write_export(tiny_clip(), folder / "clip")
    write_export(tiny_clip(seed=1, width=24), folder / "other")
    g = torch.Generator().manual_seed(0)
    for i in range(24):
        place = folder / "pictures" / ("red", "green", "blue")[i % 3]
        place.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (40, 36, 3), dtype=torch.uint8, generator=g)
        Image.fromarray(pixels.numpy()).save(place / f"{i}.png")
    return folder


def settings(world, **more):
    train = {"steps": 2, "batch_size": 8, "lr": 1e-3, "warmup": 0, "log_every": 1}
    return {
        "model.from": str(world / "clip"),
        "data.from": f"folder:{world / 'pictures'}",
        **SMALL,
        "generator.train": train,
        "clip.train": train,
        **more,
    }


def run(world, out, **more):
    return run_recipe("diffusion/genhancer", overrides=settings(world, **more), out=out, registry=REGISTRY)


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    return run(world, tmp_path_factory.mktemp("runs") / "one")


def lines(result, stage):
    return [json.loads(x) for x in (result.run / "stages" / stage / "metrics.jsonl").read_text().splitlines()]


def test_two_steps_of_both_stages(finished):
    assert finished.status == "done"
    assert finished.steps == 4
    first, second = lines(finished, "00-generator"), lines(finished, "01-clip")
    assert set(first[-1]["terms"]) == {"flow"}
    assert set(second[-1]["terms"]) == {"flow", "anchor", "cosine_to_base"}
    end = json.loads((finished.run / "stages/00-generator/result/metrics.json").read_text())
    assert set(end) == {"flow_right", "flow_wrong", "condition_gap"}
    end = json.loads((finished.run / "stages/01-clip/result/metrics.json").read_text())
    assert 0 < end["weight_drift"] < 0.1
    assert 0.5 < end["cosine_to_base"] < 1


def test_stock_open_clip_opens_the_export_and_its_text_tower_is_the_original(world, finished):
    before, _, _ = open_clip.create_model_and_transforms(f"local-dir:{world / 'clip'}")
    after, _, _ = open_clip.create_model_and_transforms(f"local-dir:{finished.export}")
    old, new = before.state_dict(), after.state_dict()
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed
    assert all(name.startswith("visual.") for name in changed)
    pixels = torch.randn(2, 3, 32, 32)
    ours = open_export(finished.export).eval()
    torch.testing.assert_close(after.eval().encode_image(pixels), ours.image(pixels).pooled, atol=1e-6, rtol=1e-6)


def test_stage_2_takes_the_generator_from_disk_when_it_is_built_again(finished, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(finished.run, again)
    shutil.rmtree(again / "stages" / "01-clip")
    shutil.rmtree(again / "export")
    run_recipe(resume=again, registry=REGISTRY)
    weights = "open_clip_model.safetensors"
    assert (again / "export" / weights).read_bytes() == (finished.export / weights).read_bytes()


def test_another_towers_tokens_full_tuning_and_a_generator_that_learns_along(world, tmp_path):
    more = {"latent.of": str(world / "other"), "clip.tune": "full", "clip.trainable": "all", "crop": None}
    result = run(world, tmp_path / "run", **more)
    assert result.status == "done"


def test_anchor_only_control_has_one_stage(world, tmp_path):
    result = run(world, tmp_path / "run", **{"clip.weight": 0, "clip.anchor.weight": 1})
    assert result.steps == 2
    assert set(lines(result, "00-clip")[-1]["terms"]) == {"anchor", "cosine_to_base"}


def test_vae_latent(world, tmp_path):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        norm_num_groups=4,
    ).save_pretrained(tmp_path / "vae")
    more = {"latent.kind": "vae", "latent.vae": str(tmp_path / "vae"), "flow": {"law": "logit-normal"}}
    result = run(world, tmp_path / "run", **more, **{"denoiser.prediction": "velocity"})
    assert result.status == "done"
    assert not (result.run / "stages/00-generator/result/latent.safetensors").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"denoiser.width": 33}, "no multiple of"),
        ({"denoiser.width": 10}, "rotary"),
        ({"latent.pool": 3}, "pool 3"),
        ({"latent.kind": "vae", "latent.vae": "./no-such-folder"}, "no-such-folder"),
        ({"latent.of": "no/such-model"}, "no/such-model"),
        ({"flow.low": 1.0}, "low"),
        ({"clip.weight": 0, "clip.anchor.weight": 0}, "nothing would be trained"),
    ],
)
def test_problems_are_named_before_any_work(world, tmp_path, more, said):
    with pytest.raises(InputError, match=said):
        run(world, tmp_path / "run", **more)
    assert not (tmp_path / "run").exists()
