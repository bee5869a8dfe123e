"""The recipe as a user runs it: from a folder of pictures to a directory that stock open_clip opens."""

from __future__ import annotations

import json
import shutil

import open_clip
import pytest
import torch
from PIL import Image

from clipgraft.checkpoint import write_export
from clipgraft.errors import InputError
from clipgraft.execution import run_recipe
from clipgraft.registry import Registry
from clipgraft.testing.tiny import tiny_clip

REGISTRY = Registry.discover(allow=["diffusion"])


def vq_folder(folder, *, blocks=4, cls="VQModel"):
    import diffusers

    torch.manual_seed(0)
    sizes = {"block_out_channels": (8,) * blocks, "norm_num_groups": 4, "latent_channels": 4}
    down, up = ("DownEncoderBlock2D",) * blocks, ("UpDecoderBlock2D",) * blocks
    model = getattr(diffusers, cls)(down_block_types=down, up_block_types=up, **sizes)
    model.save_pretrained(folder)
    return str(folder)


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


def run(world, out, **more):
    train = {"steps": 2, "batch_size": 8, "lr": 1e-3, "warmup": 0, "log_every": 1}
    settings = {
        "model.from": str(world / "clip"),
        "data.from": f"folder:{world / 'pictures'}",
        "codes.size": 16,
        "perceiver": {"width": 32, "heads": 2, "layers": 2},
        "generator.train": train,
        "clip.train": train,
        **more,
    }
    return run_recipe("diffusion/genhancer-discrete", overrides=settings, out=out, registry=REGISTRY)


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    return run(world, tmp_path_factory.mktemp("runs") / "one")


def lines(result, stage):
    return [json.loads(x) for x in (result.run / "stages" / stage / "metrics.jsonl").read_text().splitlines()]


def test_two_steps_of_both_stages(finished):
    assert finished.status == "done"
    assert finished.steps == 4
    assert set(lines(finished, "00-generator")[-1]["terms"]) == {"cross_entropy"}
    assert set(lines(finished, "01-clip")[-1]["terms"]) == {"cross_entropy", "anchor", "cosine_to_base"}
    end = json.loads((finished.run / "stages/00-generator/result/metrics.json").read_text())
    assert set(end) == {"cross_entropy_right", "cross_entropy_wrong", "condition_gap"}
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


def test_stage_2_takes_generator_and_codes_from_disk_when_it_is_built_again(finished, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(finished.run, again)
    shutil.rmtree(again / "stages" / "01-clip")
    shutil.rmtree(again / "export")
    run_recipe(resume=again, registry=REGISTRY)
    weights = "open_clip_model.safetensors"
    assert (again / "export" / weights).read_bytes() == (finished.export / weights).read_bytes()


def test_another_towers_codes_full_tuning_and_a_generator_that_learns_along(world, tmp_path):
    more = {"codes.of": str(world / "other"), "clip.tune": "full", "clip.trainable": "all", "crop": None}
    assert run(world, tmp_path / "run", **more).status == "done"


def test_anchor_only_control_has_one_stage(world, tmp_path):
    result = run(world, tmp_path / "run", **{"clip.weight": 0, "clip.anchor.weight": 1})
    assert result.steps == 2
    assert set(lines(result, "00-clip")[-1]["terms"]) == {"anchor", "cosine_to_base"}


def test_codes_of_a_vq_model(world, tmp_path):
    more = {"codes.kind": "vq", "codes.vq": vq_folder(tmp_path / "vq"), "codes.subfolder": None}
    result = run(world, tmp_path / "run", **more)
    assert result.status == "done"
    assert not (result.run / "stages/00-generator/result/latent.safetensors").exists()


def test_a_vq_model_that_does_not_fit_is_refused_before_any_work(world, tmp_path):
    coarse, other = vq_folder(tmp_path / "coarse", blocks=7), vq_folder(tmp_path / "vae", cls="AutoencoderKL")
    for where, said in ((coarse, "64 x 64 px"), (other, "AutoencoderKL")):
        with pytest.raises(InputError, match=said):
            run(world, tmp_path / "run", **{"codes.kind": "vq", "codes.vq": where, "codes.subfolder": None})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"perceiver.width": 33}, "no multiple of"),
        ({"codes.pool": 3}, "codes.pool 3"),
        ({"codes.pool": 4}, "nothing could be hidden"),
        ({"codes.kind": "vq", "codes.vq": "./no-such-folder"}, "no-such-folder"),
        ({"codes.of": "no/such-model"}, "no/such-model"),
        ({"mask.low": 0.95}, "low"),
        ({"clip.weight": 0, "clip.anchor.weight": 0}, "nothing would be trained"),
    ],
)
def test_problems_are_named_before_any_work(world, tmp_path, more, said):
    with pytest.raises(InputError, match=said):
        run(world, tmp_path / "run", **more)
    assert not (tmp_path / "run").exists()


def test_more_codes_than_tokens_is_one_clear_line(world, tmp_path):
    with pytest.raises(InputError, match=r"lower codes\.size"):
        run(world, tmp_path / "run", **{"codes.size": 5000})
