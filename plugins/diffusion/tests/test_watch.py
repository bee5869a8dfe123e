"""What a run says about itself: the numbers are right, and training doesn't notice that it is watched."""

from __future__ import annotations

import json
import random
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from clipgraft.checkpoint import open_export, write_export
from clipgraft.config.schema import TrainConfig
from clipgraft.data import open_source
from clipgraft.data.base import Sample
from clipgraft.errors import InputError, Interrupted
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.evaluation.zero_shot import ZeroShot
from clipgraft.execution import run_recipe
from clipgraft.registry import Registry
from clipgraft.stage import TrainStage
from clipgraft.testing.ranks import run_ranks
from clipgraft.testing.tiny import tiny_clip
from clipgraft_diffusion import watch as module
from clipgraft_diffusion.drift import weight_drift
from clipgraft_diffusion.genhancer import recipe
from clipgraft_diffusion.source import Part, held_out_split
from clipgraft_diffusion.watch import Watch, WatchConfig, held_out, watch

STOP = """
from clipgraft.spec import Component, hookimpl, runhook
import sys


@hookimpl
def clipgraft_run_hooks():
    return [Component(name="stop", target="stopplug:Stop", summary="stops once")]


class Stop:
    @runhook
    def after_step(self, run, step):
        if step == 2 and not (run.path / "stopped").exists():
            (run.path / "stopped").touch()
            run.stop_requested = True


sys.modules["stopplug"] = sys.modules[__name__]
"""
WEIGHTS = "open_clip_model.safetensors"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny CLIP directory, 30 pictures in three class folders, the same without classes, a hook that stops a run."""
    folder = tmp_path_factory.mktemp("world")
    write_export(tiny_clip(), folder / "clip")
    (folder / "stopplug.py").write_text(STOP)
    (folder / "flat").mkdir()
    g = torch.Generator().manual_seed(0)
    rows = ["image,caption"]
    for i in range(30):
        place = folder / "pictures" / ("red", "green", "blue")[i % 3]
        place.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(torch.randint(0, 256, (40, 36, 3), dtype=torch.uint8, generator=g).numpy())
        image.save(place / f"{i}.png")
        image.save(folder / "flat" / f"{i}.png")
        rows.append(f"flat/{i}.png,a cat {i}")
    (folder / "flat.csv").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def registry(world):
    return Registry.discover(allow=["diffusion"], files=[world / "stopplug.py"])


def settings(world, **more):
    train = {"steps": 5, "batch_size": 8, "lr": 1e-2, "warmup": 0, "log_every": 1}
    return {
        "model.from": str(world / "clip"),
        "data.from": f"folder:{world / 'pictures'}",
        "generator.train": train,
        "clip.train": train,
        "clip.weight": 0,
        "clip.anchor.weight": 1,
        "evaluate.retention": "none",
        **more,
    }


@pytest.fixture(scope="module")
def run(world, registry):
    def go(out, **more):
        return run_recipe("diffusion/genhancer", overrides=settings(world, **more), out=out, registry=registry)

    return go


@pytest.fixture(scope="module")
def watched(run, tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs") / "watched", **{"watch.every": 2, "watch.images": 16})


def rows(result, name="watch"):
    path = getattr(result, "run", result) / f"stages/00-clip/{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_looks_first_every_so_often_and_last(world, watched):
    found = rows(watched)
    assert [row["step"] for row in found] == [0, 2, 4, 5]
    assert found[0]["weight_drift"] == 0 and found[0]["cosine_to_base"] == pytest.approx(1)
    drifts = [row["weight_drift"] for row in found]
    assert drifts == sorted(drifts) and drifts[-1] > 1e-3
    assert found[-1]["cosine_to_base"] < 0.999
    end = json.loads((watched.run / "stages/00-clip/result/metrics.json").read_text())
    assert drifts[-1] == pytest.approx(end["weight_drift"], rel=1e-4)
    log = (watched.run / "log.txt").read_text()
    assert "watching 3 held-out images" in log and "canary: the same images, 3 classes" in log
    assert "clip 4/5: weights moved by" in log and "clip 5/5: weights moved by" in log


def test_cosine_and_canary_are_those_of_the_export_on_what_is_held_out(world, registry, watched):
    source = open_source(f"folder:{world / 'pictures'}", registry=registry)
    trained, held = held_out_split(source, batch_size=8)
    assert not {trained[i].id for i in range(len(trained))} & {held[i].id for i in range(len(held))}
    base, after = open_export(world / "clip").eval(), open_export(watched.export).eval()
    then, now = EncoderFeatures(base), EncoderFeatures(after)
    last = rows(watched)[-1]
    assert last["cosine_to_base"] == pytest.approx(
        float((then.images(held) * now.images(held)).sum(1).mean()), abs=1e-6
    )
    for features, row in ((then, rows(watched)[0]), (now, last)):
        expected = ZeroShot()(features, held)
        assert (row["canary_right"], row["canary_images"]) == expected.counts["top1"]
        assert row["canary"] == expected.metrics["top1"]
    assert last["weight_drift"] == weight_drift(after, base)


def test_training_does_not_notice(run, watched, tmp_path, monkeypatch):
    """Adapters with dropout draw at random in every step, so a look that drew once would change all that follows."""
    monkeypatch.setattr(recipe, "watch", lambda run, stage, *_, **__: stage)
    alone = run(tmp_path / "alone")
    assert not (alone.run / "stages/00-clip/watch.jsonl").exists()
    assert (alone.export / WEIGHTS).read_bytes() == (watched.export / WEIGHTS).read_bytes()

    def said(result):
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows(result, "metrics")]

    assert said(alone) == said(watched)


def test_a_resumed_run_goes_on_in_the_same_file(run, registry, watched, tmp_path):
    out, more = tmp_path / "resumed", {"watch.every": 2, "watch.images": 16, "hooks": ["stopplug/stop"]}
    with pytest.raises(Interrupted):
        run(out, **more)
    assert [row["step"] for row in rows(out)] == [0, 2]
    with (out / "stages/00-clip/watch.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4}) + "\n")  # a look after the last state, before the process ended
    done = run_recipe(resume=out, registry=registry)
    for one, two in zip(rows(done), rows(watched), strict=True):
        assert {**one, "seconds": 0} == {**two, "seconds": 0}
    assert (done.export / WEIGHTS).read_bytes() == (watched.export / WEIGHTS).read_bytes()


def test_a_look_that_fails_costs_no_training(run, watched, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "weight_drift", lambda *_, **__: 1 / 0)
    done = run(tmp_path / "run")
    assert "watch of clip failed" in capsys.readouterr().err
    assert (done.export / WEIGHTS).read_bytes() == (watched.export / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("canary", "said"),
    [("csv:{world}/flat.csv", "has no classes"), ("folder:{world}/none", "watch.canary: "), ("auto", None)],
)
def test_a_canary_is_checked_before_any_work(run, world, tmp_path, canary, said):
    more = {"watch.canary": canary.format(world=world), "watch.every": 0}
    if said:
        with pytest.raises(InputError, match=said):
            run(tmp_path / "run", **more)
        assert not (tmp_path / "run").exists()
    else:
        assert [row["step"] for row in rows(run(tmp_path / "run", **more))] == [0, 5]


def test_data_without_classes_needs_a_canary_or_goes_without(run, world, tmp_path):
    flat = {"data.from": f"csv:{world / 'flat.csv'}", "watch.every": 0}
    without = run(tmp_path / "without", **flat)
    assert all("canary" not in row for row in rows(without))
    assert "canary: none" in (without.run / "log.txt").read_text()
    named = run(tmp_path / "named", **flat, **{"watch.canary": f"folder:{world / 'pictures'}", "watch.images": 20})
    assert [row["canary_images"] for row in rows(named)] == [20, 20]
    assert "canary: 20 images of" in (named.run / "log.txt").read_text()


def two_processes(overrides, out, plugin):
    return run_recipe(
        "diffusion/genhancer",
        overrides=overrides,
        out=out,
        registry=Registry.discover(allow=["diffusion"], files=[plugin]),
    ).status


@pytest.mark.slow
def test_of_two_processes_one_looks(world, watched, tmp_path):
    more = settings(world, **{"watch.every": 2, "watch.images": 16})
    assert run_ranks(two_processes, 2, more, tmp_path / "run", world / "stopplug.py") == ["done", "done"]
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 2, 4, 5]
    assert rows(tmp_path / "run")[0]["canary_right"] == rows(watched)[0]["canary_right"]


# -- the hook object alone -------------------------------------------------------------------------------------------


class Numbers:
    """n random pictures of two classes."""

    name, fingerprint, classes, templates, attributes = "numbers", "n", ("cat", "dog"), ("a {}",), {}

    def __init__(self, n=40):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        pixels = torch.randint(256, (3, 32, 32), generator=torch.Generator().manual_seed(index)).byte()
        return Sample(str(index), pixels, label=index % 2)


class Both(TrainStage):
    """A stage with an encoder and nothing else."""

    def __init__(self, encoder, source, *, steps=4):
        super().__init__("both", train=TrainConfig(steps=steps, batch_size=2, lr=1), source=source)
        self.encoder = encoder

    def forward(self, batch):
        raise AssertionError("not called")

    def current_encoder(self):
        return self.encoder


@pytest.fixture
def given(tmp_path):
    """What the hook asks of a run."""
    lines, tracked = [], []
    return SimpleNamespace(
        is_main=True,
        log=SimpleNamespace(info=lines.append),
        lines=lines,
        tracked=tracked,
        track=lambda *row: tracked.append(row),
        stage_folder=lambda name: tmp_path,
        base_encoder=tiny_clip,
        config=SimpleNamespace(grafts=()),
        whole=nullcontext,
        registry=Registry.discover(allow=["diffusion"]),
        file=tmp_path / "watch.jsonl",
        hooks=SimpleNamespace(register=lambda hook, name: tracked.append(name)),
    )


def test_both_towers_modes_and_generators(given, monkeypatch):
    """Even if looking drew from the global generators."""
    real = module._embedded
    monkeypatch.setattr(module, "_embedded", lambda *given: (torch.rand(1), random.random(), real(*given))[-1])
    stage = Both(tiny_clip(), Numbers())
    stage.train()
    stage.encoder.text.eval()
    modes = [m.training for m in stage.modules()]
    hook = Watch(stage, WatchConfig(every=1, images=10))
    state, python = torch.get_rng_state(), random.getstate()
    hook.before_step(given, stage, 0)
    with torch.no_grad():
        for p in stage.encoder.text.parameters():
            p.mul_(1.01)
    hook.after_step(given, stage, 0)
    assert torch.equal(state, torch.get_rng_state()) and python == random.getstate()
    assert modes == [m.training for m in stage.modules()]
    assert all(p.grad is None for p in stage.parameters())
    first, second = map(json.loads, given.file.read_text().splitlines())
    assert first["text_weight_drift"] == 0 and second["text_weight_drift"] == pytest.approx(0.01, rel=1e-3)
    assert second["weight_drift"] == 0 and second["cosine_to_base"] == pytest.approx(1)
    assert "training images" in given.lines[0], "this stage trains on all of its source"
    assert [name for name, _, _ in given.tracked] == ["both", "both"]
    assert given.tracked[1][2]["watch.canary"] == second["canary"]


OFFER = """
from clipgraft.spec import Component, hookimpl


@hookimpl
def clipgraft_suites():
    return [Component(name="retention", target="offerplug:retention", summary="cats")]


import sys


def retention(encoder):
    return ["retrieval@csv:{folder}/flat.csv", "zero-shot@folder:{folder}/pictures"]


sys.modules["offerplug"] = sys.modules[__name__]
"""


def test_without_classes_the_canary_is_what_the_suite_classifies(given, world, tmp_path):
    (tmp_path / "offerplug.py").write_text(OFFER.replace("{folder}", str(world)))
    given.registry = Registry.discover(allow=["diffusion"], files=[tmp_path / "offerplug.py"])
    given.open_source = open_source
    source = Numbers()
    source.classes = ()
    stage = Both(tiny_clip(), source)
    Watch(stage, WatchConfig(images=20)).before_step(given, stage, 0)
    assert "canary: 20 images of" in given.lines[0] and "3 classes" in given.lines[0]
    given.open_source = lambda reference: open_source("folder:nowhere")
    Watch(stage, WatchConfig(images=20)).before_step(given, stage, 0)
    assert "canary: none, numbers has no classes and" in given.lines[-2] and "nowhere" in given.lines[-2]


def test_a_frozen_text_tower_is_read_once(given, monkeypatch):
    stage = Both(tiny_clip(), Numbers())
    stage.freeze(stage.encoder.text)
    calls = []
    real = module._classifier
    monkeypatch.setattr(module, "_classifier", lambda *given: calls.append(1) or real(*given))
    hook = Watch(stage, WatchConfig(every=1, images=10))
    hook.before_step(given, stage, 0)
    hook.after_step(given, stage, 0)
    assert len(calls) == 1 and "text_weight_drift" not in json.loads(given.file.read_text().splitlines()[1])


def test_other_stages_other_processes_and_stages_without_encoder_are_left_alone(given):
    stage, other = Both(tiny_clip(), Numbers()), Both(tiny_clip(), Numbers())
    hook = Watch(stage, WatchConfig())
    hook.before_step(given, other, 0)
    given.is_main = False
    hook.before_step(given, stage, 0)
    hook.after_step(given, stage, 499)
    hook.on_stage_end(given, stage, SimpleNamespace(encoder=stage.encoder))
    assert not given.file.exists() and not given.lines
    assert watch(given, stage, WatchConfig()) is stage and given.tracked == ["watch of both"]
    stage.current_encoder = lambda: None
    assert watch(given, stage, WatchConfig()) is stage and len(given.tracked) == 1


def test_a_tower_that_did_not_move_is_told(given):
    stage = Both(tiny_clip(), Numbers(), steps=1)
    hook = Watch(stage, WatchConfig(images=10))
    hook.before_step(given, stage, 0)
    given.encoder = stage.encoder
    hook.on_stage_end(given, stage, SimpleNamespace(encoder=stage.encoder))
    assert "next to nothing moved" in given.lines[-1]


def test_held_out_is_what_training_leaves_out():
    train, held = held_out_split(Numbers(100), batch_size=4)
    found, new = held_out(Both(tiny_clip(), train))
    assert new and [found[i].id for i in range(len(found))] == [held[i].id for i in range(len(held))]
    whole, new = held_out(Both(tiny_clip(), Numbers(4)))
    assert not new and len(whole) == 4
    assert held_out(Both(tiny_clip(), Part(whole, range(4))))[1] is False
