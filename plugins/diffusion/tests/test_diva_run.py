"""The recipe as a user runs it, with a Stable Diffusion in miniature and with a registered generator."""

from __future__ import annotations

import json

import open_clip
import pytest
import torch
from PIL import Image

from clipgraft.checkpoint import open_export, write_export
from clipgraft.errors import InputError
from clipgraft.execution import run_recipe
from clipgraft.registry import Registry
from clipgraft.testing.tiny import tiny_clip

TRAIN = {"steps": 2, "batch_size": 8, "lr": 1e-2, "optimizer": "sgd", "warmup": 0, "log_every": 1, "accumulate": 2}

PLUGIN = """
from clipgraft.spec import Component, hookimpl


@hookimpl
def clipgraft_heads():
    return [Component(name="flow", target="flowplug:Flow"), Component(name="odd", target="torch.nn:Identity")]


import sys
import torch


class Flow(torch.nn.Module):
    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.layer = torch.nn.Linear(32 + 16, 32)
        self.norm = torch.nn.LayerNorm(32)
        with torch.no_grad():
            for p in self.layer.parameters():
                p.copy_(torch.randn(p.shape, generator=g) / 7)

    def standardise(self, tokens):
        return tokens - tokens.mean(1, keepdim=True)

    def forward(self, noisy, time, condition):
        told = condition[:, None].expand(-1, noisy.shape[1], -1)
        return self.norm(self.layer(torch.cat([noisy * (1 - time)[:, None, None], told], -1)))


sys.modules["flowplug"] = sys.modules[__name__]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Tiny CLIP directories, 24 pictures with captions, and a plugin file with a generator."""
    folder = tmp_path_factory.mktemp("world")
    write_export(tiny_clip(), folder / "clip")
    write_export(tiny_clip(seed=1), folder / "other")
    write_export(tiny_clip(image_size=48), folder / "wide")
    (folder / "flowplug.py").write_text(PLUGIN)
    g = torch.Generator().manual_seed(0)
    rows = ["image,caption"]
    for i in range(24):
        pixels = torch.randint(0, 256, (80, 70, 3), dtype=torch.uint8, generator=g)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
        rows.append(f"{i}.png,a {('red', 'green', 'blue')[i % 3]} {('cat', 'dog')[i % 2]} {i % 5} a photo of the {i}")
    (folder / "pictures.csv").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def registry(world):
    return Registry.discover(allow=["diffusion"], files=[world / "flowplug.py"])


@pytest.fixture(scope="module")
def run(world, registry, tiny_diffusion):
    def go(out, *, kind="diffusers", **more):
        settings = {"model.from": str(world / "clip"), "data.from": f"csv:{world / 'pictures.csv'}", "train": TRAIN}
        if kind == "diffusers":
            settings |= {"denoiser": {"from": str(tiny_diffusion), "size": 64}, "precision": "bf16"}
        else:
            settings |= {
                "denoiser": {"kind": "head", "head": "flowplug/flow", "tower": str(world / "other")},
                "condition": {"combine": "none", "unit": True, "captions": f"csv:{world / 'pictures.csv'}"},
                "recap": {"kind": "cls"},
            }
        settings |= {"evaluate.retention": "none"}
        return run_recipe("diffusion/diva", overrides=settings | more, out=out, registry=registry)

    return go


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs") / "one")


def test_two_steps_leave_metrics(finished):
    assert finished.status == "done"
    assert finished.steps == 2
    lines = (finished.run / "stages/00-clip/metrics.jsonl").read_text().splitlines()
    assert set(json.loads(lines[-1])["terms"]) == {"noise"}
    end = json.loads((finished.run / "stages/00-clip/result/metrics.json").read_text())
    assert set(end) == {"weight_drift", "cosine_to_base", "noise_right", "noise_wrong", "condition_gap"}
    assert 0 < end["weight_drift"] < 0.1


def test_d14_stock_open_clip_opens_the_export_and_the_text_tower_is_the_original(world, finished):
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


def test_official_switches_and_drawn_tokens_added_to_the_prompt(run, tmp_path):
    recap, condition = {"kind": "random", "k": 76}, {"combine": "add"}
    done = run(tmp_path / "run", compat="official", recap=recap, condition=condition, crop=None, precision="fp32")
    assert done.status == "done"


def test_a_registered_generator_told_through_fitted_captions(run, tmp_path):
    more = {"anchor.weight": 0.5, "crop": None}
    done = run(tmp_path / "run", kind="head", **more)
    log = (done.run / "log.txt").read_text()
    assert "explains" in log
    terms = json.loads((done.run / "stages/00-clip/metrics.jsonl").read_text().splitlines()[-1])["terms"]
    assert set(terms) == {"noise", "anchor", "cosine_to_base"}
    again = run(tmp_path / "again", kind="head", **more)
    weights = "open_clip_model.safetensors"
    assert (again.export / weights).read_bytes() == (done.export / weights).read_bytes()
    other = run(tmp_path / "other", kind="head", **more, **{"denoiser.random": True})
    assert (other.export / weights).read_bytes() != (done.export / weights).read_bytes()


def test_anchor_only_control(run, tmp_path):
    done = run(tmp_path / "run", kind="head", weight=0, **{"anchor.weight": 1})
    assert set(json.loads((done.run / "stages/00-clip/metrics.jsonl").read_text().splitlines()[-1])["terms"]) == {
        "anchor",
        "cosine_to_base",
    }


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        ("diffusers", {"denoiser.from": "./no-such-folder"}, "no-such-folder"),
        ("diffusers", {"denoiser.size": 72}, "multiple of 16"),
        ("diffusers", {"noise.end": 0.02}, "beta_end"),
        ("diffusers", {"condition.combine": "add"}, "as many tokens"),
        ("diffusers", {"recap": {"kind": "average", "window": 20}}, "window 20"),
        ("diffusers", {"precision": "fp16"}, "fp16"),
        ("diffusers", {"condition.captions": "csv:x.csv"}, "condition.captions"),
        ("head", {"denoiser.head": "flowplug/none"}, "flowplug/none"),
        ("head", {"denoiser.head": "flowplug/odd"}, "standardise"),
        ("head", {"condition.captions": "csv:no-such.csv"}, "no-such.csv"),
        ("diffusers", {"weight": 0}, "nothing would be trained"),
    ],
)
def test_problems_are_named_before_any_work(run, tmp_path, kind, more, said):
    with pytest.raises(InputError, match=said):
        run(tmp_path / "run", kind=kind, **more)
    assert not (tmp_path / "run").exists()


def test_a_generator_over_towers_of_another_size_is_refused(run, world, tmp_path):
    with pytest.raises(InputError, match="48 px"):
        run(tmp_path / "run", kind="head", **{"denoiser.tower": str(world / "wide")})
