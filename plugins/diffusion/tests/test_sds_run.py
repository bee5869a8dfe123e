"""The recipe as a user runs it: with a Stable Diffusion in miniature, a registered generator, and one of its own."""

from __future__ import annotations

import json
import shutil

import open_clip
import pytest
import torch
from PIL import Image

from clipgraft.checkpoint import open_export, write_export
from clipgraft.errors import InputError, Interrupted
from clipgraft.execution import run_recipe
from clipgraft.registry import Registry
from clipgraft.spec import runhook
from clipgraft.testing.tiny import tiny_clip

TRAIN = {"steps": 2, "batch_size": 8, "lr": 1e-2, "warmup": 0, "log_every": 1, "accumulate": 2}
DECODER = {
    "width": 24,
    "heads": 2,
    "samples": 16,
    "low": 0.1,
    "train": {"steps": 2, "batch_size": 8, "lr": 1e-3, "warmup": 0},
}
PLUGIN = """
import sys
import torch
from clipgraft.spec import Component, hookimpl


@hookimpl
def clipgraft_heads():
    return [Component(name="flow", target="sdsplug:Flow"), Component(name="odd", target="torch.nn:Identity")]


class Flow(torch.nn.Module):
    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(48, 32, generator=g) / 7)

    def standardise(self, tokens):
        return tokens[:, :4] - tokens.mean(1, keepdim=True)

    def forward(self, noisy, time, condition):
        told = condition[:, None].expand(-1, noisy.shape[1], -1)
        return torch.cat([noisy * (1 - time)[:, None, None], told], -1) @ self.weight


sys.modules["sdsplug"] = sys.modules[__name__]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Tiny CLIP directories, 24 pictures with two captions each, some without, and a plugin file with a generator."""
    folder = tmp_path_factory.mktemp("world")
    write_export(tiny_clip(), folder / "clip")
    write_export(tiny_clip(seed=1, context=12), folder / "other")
    (folder / "sdsplug.py").write_text(PLUGIN)
    g = torch.Generator().manual_seed(0)
    rows, bare = ["image,caption"], ["image,label"]
    for i in range(24):
        pixels = torch.randint(0, 256, (3, 40, 36), dtype=torch.uint8, generator=g)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
        rows += [f"{i}.png,{n} {('red', 'green', 'blue')[i % 3]} cat {i}" for n in ("a", "one")]
        bare.append(f"{i}.png,{('cat', 'dog')[i % 2]}")
    (folder / "pictures.csv").write_text("\n".join(rows))
    (folder / "bare.csv").write_text("\n".join(bare))
    return folder


@pytest.fixture(scope="module")
def registry(world):
    return Registry.discover(allow=["diffusion"], files=[world / "sdsplug.py"])


@pytest.fixture(scope="module")
def run(world, registry, tiny_diffusion):
    def go(out, *, kind="diffusers", data="pictures.csv", **more):
        settings = {"model.from": str(world / "clip"), "data.from": f"csv:{world / data}", "train": TRAIN}
        if kind == "diffusers":
            settings |= {"denoiser": {"from": str(tiny_diffusion), "checkpointing": True}, "weight": 0.1}
        elif kind == "head":
            settings |= {"denoiser": {"kind": "head", "head": "sdsplug/flow", "tower": str(world / "other")}}
        else:
            settings |= {"denoiser": {"kind": "train"}, "decoder": DECODER, "sds.low": 200}
            settings |= {"mapper.warmup": {"steps": 3, "batch_size": 8, "lr": 0.01, "warmup": 0}, "crop": None}
        settings |= {"evaluate.retention": "none", "watch.canary": "none"}
        dry = more.pop("dry_run", False)
        return run_recipe("diffusion/sds-clip", overrides=settings | more, out=out, registry=registry, dry_run=dry)

    return go


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs") / "one")


def weights(done):
    return (done.export / "open_clip_model.safetensors").read_bytes()


def test_two_steps_with_a_stable_diffusion_leave_metrics(finished):
    assert (finished.status, finished.steps) == ("done", 2)
    line = json.loads((finished.run / "stages/00-clip/metrics.jsonl").read_text().splitlines()[-1])
    assert set(line["terms"]) == {"contrastive", "sds", "latent"}
    assert line["loss"] == pytest.approx(line["terms"]["contrastive"] + 0.1 * line["terms"]["sds"], rel=1e-4)
    end = json.loads((finished.run / "stages/00-clip/result/metrics.json").read_text())
    assert {"weight_drift", "text_weight_drift", "cosine_to_base", "sds_right", "caption_gap", "latent"} <= set(end)
    assert 0 < end["weight_drift"] < 0.5
    assert len((finished.run / "stages/00-clip/watch.jsonl").read_text().splitlines()) == 2


def test_s11_the_map_is_gone_from_the_export_and_stock_open_clip_opens_it(world, finished):
    before, _, _ = open_clip.create_model_and_transforms(f"local-dir:{world / 'clip'}")
    after, _, _ = open_clip.create_model_and_transforms(f"local-dir:{finished.export}")
    old, new = before.state_dict(), after.state_dict()
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {name for name in old if ".ln_" in f".{name}"}
    assert sorted(p.name for p in finished.export.glob("*.safetensors")) == ["open_clip_model.safetensors"]
    assert (finished.run / "stages/00-clip/result/mapper.safetensors").exists()
    pixels = torch.randn(2, 3, 32, 32)
    ours = open_export(finished.export).eval()
    torch.testing.assert_close(after.eval().encode_image(pixels), ours.image(pixels).pooled, atol=1e-6, rtol=1e-6)


def test_the_autoencoder_is_not_needed(run, tiny_diffusion, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_diffusion, bare, ignore=shutil.ignore_patterns("vae"))
    done = run(tmp_path / "run", **{"denoiser.from": str(bare), "precision": "bf16", "sds.jacobian": "none"})
    assert done.status == "done"


def test_a_generator_of_the_runs_own_and_its_controls(run, tmp_path):
    done = run(tmp_path / "run", kind="train")
    stages = [p.name for p in sorted((done.run / "stages").iterdir())]
    assert stages == ["00-decoder", "01-mapper", "02-clip"]
    warm = json.loads((done.run / "stages/01-mapper/result/metrics.json").read_text())
    assert set(warm) == {"sds_right", "sds_wrong", "caption_gap", "latent"}
    for number, more in enumerate(({"denoiser.random": True, "sds.jacobian": "none"}, {"weight": 0})):
        other = run(tmp_path / f"other{number}", kind="train", **more)
        assert weights(other) != weights(done), more
    assert [p.name for p in (other.run / "stages").iterdir()] == ["00-clip"]  # lambda 0 needs no generator
    assert run(tmp_path / "dry", kind="train", dry_run=True).status == "dry-run"
    assert not (tmp_path / "dry").exists()


def test_a_registered_generator_told_by_another_tower(run, tmp_path):
    done = run(tmp_path / "run", kind="head")
    assert done.status == "done"


class Stop:
    observer = False

    def __init__(self, at):
        self.at = at

    @runhook
    def after_step(self, run, stage, step):
        run.stop_requested = stage.name == "clip" and step + 1 == self.at


def test_a_resumed_run_is_the_same_run(run, registry, tmp_path, monkeypatch):
    from clipgraft.runhooks import RunHooks

    more = {"train.steps": 4, "train.accumulate": 1}
    whole = run(tmp_path / "whole", **more)
    made = RunHooks.__init__

    def with_stop(self, *args, **kwargs):
        made(self, *args, **kwargs)
        self.register(Stop(2), "stop")

    with monkeypatch.context() as patch:
        patch.setattr(RunHooks, "__init__", with_stop)
        with pytest.raises(Interrupted):
            run(tmp_path / "halved", **more)
    resumed = run_recipe(resume=tmp_path / "halved", registry=registry)
    assert weights(resumed) == weights(whole)


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        ("diffusers", {"denoiser.from": "./no-such-folder"}, "no-such-folder"),
        ("diffusers", {"sds.end": 0.02}, "beta_end"),
        ("diffusers", {"denoiser.latent": [4, 9, 8]}, "multiples of 2"),
        ("diffusers", {"denoiser.latent": [8, 8, 8]}, r"\[4, height, width\]"),
        ("diffusers", {"precision": "fp16"}, "fp16"),
        ("diffusers", {"data": "bare.csv"}, "no caption"),
        ("diffusers", {"weight": 0, "contrastive": 0}, "nothing would be trained"),
        ("diffusers", {"mapper.train": False}, "warmup"),
        ("head", {"denoiser.head": "sdsplug/odd"}, "standardise"),
        ("head", {"denoiser.head": "sdsplug/none"}, "sdsplug/none"),
        ("head", {"denoiser.tower": None}, "tower"),
        ("train", {"decoder.low": 0.9}, "decoder.low"),
        ("train", {"decoder.pool": 3}, "pool"),
        ("train", {"trainable": "most"}, "trainable"),
    ],
)
def test_problems_are_named_before_any_work(run, tmp_path, kind, more, said):
    with pytest.raises(InputError, match=said):
        run(tmp_path / "run", kind=kind, **more)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("part", "file", "change", "said"),
    [
        ("scheduler", "scheduler_config.json", {"prediction_type": "v_prediction"}, "predicts v_prediction"),
        ("unet", "config.json", {"cross_attention_dim": 24}, "width 24"),
        ("unet", "config.json", {"in_channels": 9}, "inpainting"),
        ("unet", "config.json", {"class_embed_type": "projection"}, "class_embed_type"),
        ("text_encoder", None, {}, "text encoder"),
        ("tokenizer", None, {}, "tokenizer"),
    ],
)
def test_models_that_dont_fit_are_refused(run, tiny_diffusion, tmp_path, part, file, change, said):
    other = tmp_path / "other"
    shutil.copytree(tiny_diffusion, other)
    if file is None:
        shutil.rmtree(other / part)
    else:
        path = other / part / file
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=said):
        run(tmp_path / "run", **{"denoiser.from": str(other)})
    assert not (tmp_path / "run").exists()
