"""The recipe as a user runs it: a Stable unCLIP in miniature, a decoder of its own, a registered one."""

from __future__ import annotations

import json
import shutil

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from clipgraft.checkpoint import open_export, write_export
from clipgraft.errors import InputError
from clipgraft.execution import run_recipe
from clipgraft.registry import Registry
from clipgraft.testing.tiny import tiny_clip

TRAIN = {"steps": 2, "batch_size": 8, "lr": 1e-2, "optimizer": "sgd", "warmup": 0, "log_every": 1}
WEIGHTS = "open_clip_model.safetensors"
OWN = {"width": 24, "heads": 2, "positions": 4, "low": 0.0, "samples": 16, "train": TRAIN | {"lr": 1e-3}}

PLUGIN = """
import sys

import torch

from clipgraft.spec import Component, hookimpl


@hookimpl
def clipgraft_heads():
    return [Component(name="flow", target="toldplug:Flow"), Component(name="odd", target="torch.nn:Identity")]


class Flow(torch.nn.Module):
    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.layer = torch.nn.Linear(32 + 32, 32)
        with torch.no_grad():
            for p in self.layer.parameters():
                p.copy_(torch.randn(p.shape, generator=g) / 7)

    def standardise(self, tokens):
        return tokens - tokens.mean(1, keepdim=True)

    def forward(self, noisy, time, told):
        assert told.shape[1:] == (32,)
        return self.layer(torch.cat([noisy, told[:, None].expand(-1, noisy.shape[1], -1)], -1))


sys.modules["toldplug"] = sys.modules[__name__]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Tiny CLIP directories, 24 pictures in three class folders, and a plugin file with a generator told labels."""
    folder = tmp_path_factory.mktemp("world")
    write_export(tiny_clip(), folder / "clip")
    write_export(tiny_clip(embed=24), folder / "wider")
    write_export(tiny_clip(seed=1), folder / "other")
    write_export(tiny_clip(image_size=48), folder / "large")
    (folder / "toldplug.py").write_text(PLUGIN)
    g = torch.Generator().manual_seed(0)
    for i in range(24):
        place = folder / "pictures" / ("red", "green", "blue")[i % 3]
        place.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (3, 80, 70), dtype=torch.uint8, generator=g)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(place / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def registry(world):
    return Registry.discover(allow=["diffusion"], files=[world / "toldplug.py"])


@pytest.fixture(scope="module")
def run(world, registry, tiny_unclip):
    denoisers = {
        "diffusers": {"kind": "diffusers", "from": str(tiny_unclip), "size": 64},
        "train": {"kind": "train"},
        "head": {"kind": "head", "head": "toldplug/flow", "tower": str(world / "other"), "samples": 8},
    }

    def go(out, *, kind="diffusers", **more):
        settings = {
            "model.from": str(world / "clip"),
            "data.from": f"folder:{world / 'pictures'}",
            "denoiser": denoisers[kind],
            "decoder": OWN,
            "clip.train": TRAIN,
            "clip.anchor.weight": 0.0,
            "noise": {"error": "noise"} if kind == "diffusers" else {"error": "sample"},
            "evaluate.retention": "none",
            "watch.every": 1,
        }
        settings["clip.tune"] = "full"
        return run_recipe("diffusion/un2clip", overrides=settings | more, out=out, registry=registry)

    return go


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs") / "one", precision="bf16")


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs") / "own", kind="train", crop=None)


def terms(result, stage):
    lines = (result.run / "stages" / stage / "metrics.jsonl").read_text().splitlines()
    return set(json.loads(lines[-1])["terms"])


def measured(result, stage):
    return json.loads((result.run / "stages" / stage / "result" / "metrics.json").read_text())


def test_two_steps_against_a_stable_unclip(finished):
    assert (finished.status, finished.steps) == ("done", 2)
    assert terms(finished, "00-clip") == {"error"}
    end = measured(finished, "00-clip")
    assert set(end) == {"weight_drift", "cosine_to_base", "error_right", "error_wrong", "condition_gap"}
    assert 0 < end["weight_drift"] < 0.1
    looks = (finished.run / "stages/00-clip/watch.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in looks] == [0, 1, 2]


@pytest.mark.parametrize("which", ["finished", "trained"])
def test_u06_u10_stock_open_clip_opens_the_export_and_the_text_tower_is_the_original(world, which, request):
    result = request.getfixturevalue(which)
    before, _, _ = open_clip.create_model_and_transforms(f"local-dir:{world / 'clip'}")
    after, _, _ = open_clip.create_model_and_transforms(f"local-dir:{result.export}")
    old, new = before.state_dict(), after.state_dict()
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed
    assert all(name.startswith("visual.") for name in changed)
    before.visual.load_state_dict(after.visual.state_dict(), strict=True)
    pixels = torch.randn(2, 3, 32, 32)
    ours = open_export(result.export).eval().image(pixels).pooled
    torch.testing.assert_close(before.eval().encode_image(pixels), ours, atol=1e-6, rtol=1e-6)


def test_a_decoder_of_ones_own_comes_first_with_the_statistics_of_its_label(trained):
    assert (trained.status, trained.steps) == ("done", 4)
    assert terms(trained, "00-decoder") == {"decoder"}
    assert terms(trained, "01-clip") == {"error"}
    assert set(measured(trained, "00-decoder")) == {"decoder_right", "decoder_wrong", "condition_gap"}
    left = {p.stem for p in (trained.run / "stages/00-decoder/result").glob("*.safetensors")}
    assert left == {"decoder", "teller"}


def test_stage_2_built_again_takes_the_decoder_from_disk(trained, registry, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(trained.run, again)
    shutil.rmtree(again / "stages" / "01-clip")
    shutil.rmtree(again / "export")
    run_recipe(resume=again, registry=registry)
    assert (again / "export" / WEIGHTS).read_bytes() == (trained.export / WEIGHTS).read_bytes()


def test_a_run_stopped_between_steps_goes_on_as_if_it_had_not(run, registry, finished, tmp_path):
    """A state is kept after every step; the end of the stage never comes, so the last one is taken up again."""
    stopped = tmp_path / "stopped"
    with pytest.MonkeyPatch.context() as patch:
        from clipgraft.runner import Run

        def interrupted(self, plan, result):
            raise KeyboardInterrupt

        patch.setattr(Run, "keep", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(stopped, **{"clip.train": TRAIN | {"save_every": 1}, "precision": "bf16"})
    assert list((stopped / "stages/00-clip/state").iterdir())
    shutil.rmtree(max((stopped / "stages/00-clip/state").iterdir()))
    run_recipe(resume=stopped, registry=registry)
    assert (stopped / "export" / WEIGHTS).read_bytes() == (finished.export / WEIGHTS).read_bytes()


def test_adapters_an_anchor_and_drawn_label_noise(run, tmp_path):
    more = {"clip.tune": "lora", "clip.anchor.weight": 0.5, "condition.noise_level": "uniform", "passes": 2}
    done = run(tmp_path / "run", **more)
    assert terms(done, "00-clip") == {"error", "anchor", "cosine_to_base"}


def test_latents_on_disk_and_recomputed_activations_change_nothing(run, tmp_path):
    more = {"clip.tune": "lora", "clip.train": TRAIN | {"lr": 1.0}, "condition.noise_level": 30}
    kept = {"denoiser.cache": str(tmp_path / "latents"), "clip.checkpointing": True}
    plain, again = run(tmp_path / "plain", **more), run(tmp_path / "again", **more, **kept)
    old, new = load_file(plain.export / WEIGHTS), load_file(again.export / WEIGHTS)
    torch.testing.assert_close(new, old, atol=1e-6, rtol=1e-5)
    assert len(list((tmp_path / "latents").glob("*/*.safetensors"))) == 1


def test_a_registered_generator_that_is_told_the_label(run, tmp_path):
    done = run(tmp_path / "run", kind="head", crop=None)
    other = run(tmp_path / "other", kind="head", crop=None, **{"denoiser.random": True})
    assert (other.export / WEIGHTS).read_bytes() != (done.export / WEIGHTS).read_bytes()


def test_control_arms_differ_and_the_anchor_alone_needs_no_decoder(run, trained, tmp_path):
    shuffled = run(tmp_path / "shuffled", kind="train", crop=None, **{"condition.shuffled": True})
    assert (shuffled.export / WEIGHTS).read_bytes() != (trained.export / WEIGHTS).read_bytes()
    alone = run(tmp_path / "alone", kind="train", **{"clip.weight": 0, "clip.anchor.weight": 1})
    assert alone.steps == 2
    assert terms(alone, "00-clip") == {"anchor", "cosine_to_base"}


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        ("diffusers", {"denoiser.from": "./no-such-folder"}, "no-such-folder"),
        ("diffusers", {"denoiser.size": 72}, "multiple of 16"),
        ("diffusers", {"noise.end": 0.02}, "beta_end"),
        ("diffusers", {"model.from": "WORLD/wider"}, "width 16, this tower's have 24.*kind train"),
        ("diffusers", {"precision": "fp16"}, "fp16"),
        ("diffusers", {"denoiser.sha256": {"unet": "0" * 64}}, "sha256"),
        ("diffusers", {"watch.canary": "folder:no-such"}, "watch.canary"),
        ("diffusers", {"clip.weight": 0}, "nothing would be trained"),
        ("train", {"decoder.low": 0.9}, "set decoder.low"),
        ("train", {"denoiser.cache": "latents"}, "cache keeps an autoencoder's latents"),
        ("train", {"decoder.pool": 3}, "pool 3"),
        ("train", {"decoder.data": "folder:no-such"}, "no-such"),
        ("head", {"denoiser.head": "toldplug/odd"}, "standardise"),
        ("head", {"denoiser.tower": "WORLD/large"}, "48 px"),
    ],
)
def test_problems_are_named_before_any_work(run, world, tmp_path, kind, more, said):
    more = {key: v.replace("WORLD", str(world)) if isinstance(v, str) else v for key, v in more.items()}
    with pytest.raises(InputError, match=said):
        run(tmp_path / "run", kind=kind, **more)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_it_in_one_line_and_leaves_nothing(world, registry, tiny_unclip, tmp_path):
    settings = {"model.from": str(world / "wider"), "data.from": f"folder:{world / 'pictures'}"}
    settings |= {"denoiser": {"kind": "diffusers", "from": str(tiny_unclip), "size": 64}}
    more = {"overrides": settings, "out": tmp_path / "out", "dry_run": True, "registry": registry}
    with pytest.raises(InputError, match=r"this tower's have 24.*kind train") as said:
        run_recipe("diffusion/un2clip", **more)
    assert "\n" not in str(said.value)
    settings["model.from"] = str(world / "clip")
    assert run_recipe("diffusion/un2clip", **more).status == "dry-run"
    assert not (tmp_path / "out").exists()
