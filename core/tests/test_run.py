"""A run from its config to its export: directory, resuming, refusals, hooks, signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image

from clipgraft import files
from clipgraft.checkpoint import open_export, write_export
from clipgraft.errors import InputError, Interrupted
from clipgraft.evaluation import records
from clipgraft.evaluation.comparison import tallies
from clipgraft.execution import run_recipe
from clipgraft.registry import Registry
from clipgraft.spec import runhook
from clipgraft.testing.tiny import tiny_clip


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A tiny CLIP directory and 24 captioned pictures."""
    folder = tmp_path_factory.mktemp("world")
    write_export(tiny_clip(), folder / "clip")
    g = torch.Generator().manual_seed(0)
    rows = ["image,caption"]
    for i in range(24):
        pixels = torch.randint(0, 256, (40, 40, 3), dtype=torch.uint8, generator=g)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
        rows.append(f"{i}.png,a picture of thing{i}")
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n")
    return folder


def settings(world: Path, **more: object) -> dict[str, object]:
    base = {"model.from": str(world / "clip"), "data.from": f"csv:{world / 'pairs.csv'}", "train.steps": 4}
    return {**base, "train.batch_size": 8, "train.warmup": 0, "train.lr": 1e-3, "train.log_every": 1, **more}


REGISTRY = Registry.discover(allow=[])


def test_a_run_leaves_a_directory_that_tells_the_story(world, tmp_path):
    evaluators = [{"use": "core/retrieval"}]
    result = run_recipe(
        "finetune",
        overrides=settings(world, **{"evaluate.on": evaluators, "evaluate.data": f"csv:{world / 'pairs.csv'}"}),
        out=tmp_path / "run",
        registry=REGISTRY,
    )
    assert result.status == "done" and result.steps == 4
    names = {p.name for p in result.run.iterdir()}
    expected = (
        "config.yaml command.txt env.json plugins.json log.txt status.json evaluations.json stages evaluation export"
    )
    assert set(expected.split()) <= names
    assert result.metrics.keys() == {
        f"core/retrieval.{m}"
        for m in json.loads((result.run / "evaluations.json").read_text())["after"]["core/retrieval"]
    }
    rows = [json.loads(line) for line in (result.run / "stages/00-train/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3, 4] and [r["samples"] for r in rows] == [8, 16, 24, 32]
    assert json.loads((result.run / "status.json").read_text())["status"] == "done"
    assert not (result.run / "stages/00-train/state").exists(), "resume states are dropped when a stage is done"
    before, after = (records.read(result.run / "evaluation" / when) for when in ("before", "after"))
    assert len(before["core/retrieval"].samples) >= 24
    counted, log = tallies(before, after), (result.run / "log.txt").read_text()
    assert counted and all(str(tally) in log for tally in counted), "counts before and after, with errors and p"


def test_the_export_opens_in_open_clip_and_differs_from_the_base(world, tmp_path):
    result = run_recipe("finetune", overrides=settings(world), out=tmp_path / "run", registry=REGISTRY)
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{result.export}")
    pixels = torch.rand(2, 3, 32, 32)
    ours, base = open_export(result.export), open_export(world / "clip")
    with torch.no_grad():
        theirs = model.eval().encode_image(ours.preprocess.normalize(pixels))
        torch.testing.assert_close(theirs, ours.eval().image(ours.preprocess.normalize(pixels)).pooled)
        assert (theirs - base.eval().image(base.preprocess.normalize(pixels)).pooled).abs().max() > 1e-3
    assert [step["recipe"] for step in json.loads((result.export / "clipgraft.json").read_text())["lineage"]] == [
        "core/finetune"
    ]


def test_the_lineage_names_every_base_by_its_weights(world, tmp_path):
    """Of an export the file's hash, of an open_clip folder the tensors': nobody else's weights go by that name."""
    plain = tmp_path / "plain"
    write_export(tiny_clip(), plain)
    (plain / "clipgraft.json").unlink()
    steps = []
    for name, base in (("a", plain), ("b", plain), ("c", world / "clip")):
        overrides = settings(world, **{"model.from": str(base), "train.steps": 1})
        result = run_recipe("finetune", overrides=overrides, out=tmp_path / name, registry=REGISTRY)
        steps += json.loads((result.export / "clipgraft.json").read_text())["lineage"]
    one, two, ours = (step["base_sha256"] for step in steps)
    assert one == two == files.tensors_digest(tiny_clip().state_dict()) and len(one) == 64
    assert ours == files.sha256_of(world / "clip" / "open_clip_model.safetensors")


def test_the_same_seed_gives_the_same_weights_and_another_does_not(world, tmp_path):
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        result = run_recipe("finetune", overrides=settings(world), seed=seed, out=tmp_path / name, registry=REGISTRY)
        found.append((result.export / "open_clip_model.safetensors").read_bytes())
    assert found[0] == found[1] != found[2]


class StopAt:
    def __init__(self, step: int) -> None:
        self.step = step

    @runhook
    def after_step(self, run, stage, step, output) -> None:
        run.stop_requested = step + 1 == self.step


def test_interrupted_runs_resume_to_the_same_export(world, tmp_path, monkeypatch):
    whole = run_recipe("finetune", overrides=settings(world), out=tmp_path / "whole", registry=REGISTRY)
    from clipgraft import runner as module

    original = module.Run.__post_init__

    def with_hook(self) -> None:
        original(self)
        self.hooks.register(StopAt(2), "stop")

    with monkeypatch.context() as patch:
        patch.setattr(module.Run, "__post_init__", with_hook)
        with pytest.raises(Interrupted, match="after step 2; continue with --resume"):
            run_recipe("finetune", overrides=settings(world), out=tmp_path / "run", registry=REGISTRY)
    assert json.loads((tmp_path / "run/status.json").read_text())["status"] == "interrupted"
    assert not (tmp_path / "run/export").exists()
    again = run_recipe(resume=tmp_path / "run", registry=REGISTRY)
    assert (again.export / "open_clip_model.safetensors").read_bytes() == (
        whole.export / "open_clip_model.safetensors"
    ).read_bytes()
    third = run_recipe(resume=tmp_path / "run", registry=REGISTRY)
    assert third.status == "done", "resuming a finished run is harmless"


@pytest.mark.parametrize(("bad", "message"), [
    ({"model.from": "nowhere/clip"}, "nowhere/clip"),
    ({"train.batch_size": 48}, "48"),
    ({"loss_weights": [1.0, 2.0]}, "one per loss"),
    ({"train.batch_size": 9, "train.accumulate": 2}, "divisible"),
    ({"trackers": ["mlflow"]}, "mlflow is not installed"),
])  # fmt: skip
def test_bad_settings_are_one_clear_line(world, tmp_path, bad, message):
    with pytest.raises(InputError, match=message) as error:
        run_recipe("finetune", overrides=settings(world, **bad), out=tmp_path / "run", registry=REGISTRY)
    assert "\n" not in str(error.value)


def test_a_loss_of_something_else_than_embeddings_is_refused_by_a_dry_run(world, tmp_path):
    (tmp_path / "elsewhere.py").write_text(
        "from clipgraft.spec import Component, hookimpl\n\n\n"
        "@hookimpl\ndef clipgraft_losses():\n"
        "    return [Component(name='pixels', target='torch.nn:L1Loss', summary='Pixels')]\n"
    )
    alone = Registry.discover(allow=[], files=[tmp_path / "elsewhere.py"])
    changes = settings(world, losses=["core/clip", "pixels"])
    said = r"^finetune judges embeddings, elsewhere/pixels doesn't \(Pixels\); see: clipgraft list losses$"
    with pytest.raises(InputError, match=said):
        run_recipe("finetune", overrides=changes, out=tmp_path / "run", dry_run=True, registry=alone)
    with (tmp_path / "elsewhere.py").open("a") as file:
        file.write("\n\n@hookimpl\ndef clipgraft_recipes():\n    return [Component(name='paint', target='x:y')]\n")
    more = Registry.discover(allow=[], files=[tmp_path / "elsewhere.py"])
    with pytest.raises(InputError, match=r"; run a recipe of its plugin: elsewhere/paint$"):
        run_recipe("finetune", overrides=changes, out=tmp_path / "run", dry_run=True, registry=more)


def test_a_new_run_never_overwrites_another(world, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="is not empty"):
        run_recipe("finetune", overrides=settings(world), out=tmp_path / "run", registry=REGISTRY)
    assert (tmp_path / "run/thesis.tex").read_text() == "years of work"


def test_a_dry_run_checks_and_writes_nothing(world, tmp_path):
    result = run_recipe("finetune", overrides=settings(world), out=tmp_path / "run", dry_run=True, registry=REGISTRY)
    assert result.status == "dry-run" and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_continues(world, tmp_path, number):
    sets = [f"--set={k}={v}" for k, v in settings(world, **{"train.steps": 400}).items()]
    environment = {**os.environ, "CLIPGRAFT_PLUGINS": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "clipgraft", "run"]
    metrics = tmp_path / "run/stages/00-train/metrics.jsonl"
    process = subprocess.Popen(
        [*command, "finetune", *sets, "--out", tmp_path / "run"], env=environment, stderr=subprocess.PIPE
    )
    until = time.monotonic() + 90
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 20) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error.decode()
    assert b"Traceback" not in error and b"--resume" in error
    subprocess.run([*command, "--resume", tmp_path / "run"], env=environment, check=True, capture_output=True)
    subprocess.run(
        [*command, "finetune", *sets, "--out", tmp_path / "whole"], env=environment, check=True, capture_output=True
    )
    a, b = (tmp_path / name / "export/open_clip_model.safetensors" for name in ("run", "whole"))
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.slow
def test_two_processes_measure_like_one(world, tmp_path):
    """torchrun clipgraft eval: each encodes its share, one speaks, and the numbers are the same."""
    environment = {**os.environ, "CLIPGRAFT_PLUGINS": "", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    words = ["eval", world / "clip", "--on", "retrieval", "--data", f"csv:{world / 'pairs.csv'}", "--batch-size", "5"]
    found = []
    for launch, out in (([sys.executable, "-m"], "one"), (torchrun, "two")):
        command = [*launch, "clipgraft", *words, "--json", "--out", tmp_path / out]
        done = subprocess.run(command, env=environment, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        found.append(json.loads(done.stdout))
    assert found[0] == found[1]
    one, two = (records.read(tmp_path / out) for out in ("one", "two"))
    assert one == two


@pytest.mark.slow
def test_two_processes_train_like_one(world, tmp_path):
    """torchrun with two gloo ranks: the same weights up to rounding as one process on the same global batch."""
    sets = [f"--set={k}={v}" for k, v in settings(world, **{"train.optimizer": "sgd"}).items()]
    environment = {**os.environ, "CLIPGRAFT_PLUGINS": "", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "clipgraft",
    ]
    for name, launch in (("one", [sys.executable, "-m", "clipgraft"]), ("two", torchrun)):
        done = subprocess.run(
            [*launch, "run", "finetune", *sets, "--out", tmp_path / name], env=environment, capture_output=True
        )
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        assert done.stdout.decode().count("done: ") == 1, "one process speaks"
    assert json.loads((tmp_path / "two/env.json").read_text())["processes"] == 2
    one, two = (open_export(tmp_path / name / "export").state_dict() for name in ("one", "two"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


def test_a_tracker_receives_the_numbers(world, tmp_path):
    pytest.importorskip("tensorboard")
    run_recipe("finetune", overrides=settings(world, trackers=["tensorboard"]), out=tmp_path / "run", registry=REGISTRY)
    (events,) = (tmp_path / "run").rglob("events.out.tfevents.*")
    assert b"train/loss" in events.read_bytes()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_bf16_autocast_trains_fp32_weights(world, tmp_path, accumulate):
    changes = {"precision": "bf16", "train.accumulate": accumulate}
    result = run_recipe("finetune", overrides=settings(world, **changes), out=tmp_path / "run", registry=REGISTRY)
    after, base = open_export(result.export), open_export(world / "clip")
    assert {p.dtype for p in after.parameters()} == {torch.float32}
    assert not torch.equal(after.image.tower.conv1.weight, base.image.tower.conv1.weight)
    rows = [json.loads(line) for line in (result.run / "stages/00-train/metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["loss"] < 10 for row in rows)


def test_evaluation_inside_a_stage_leaves_the_training_as_it_is(world, tmp_path):
    data = f"csv:{world / 'pairs.csv'}"
    measured = {"evaluate.on": [{"use": "core/retrieval"}], "evaluate.data": data, "train.evaluate_every": 2}
    weights = []
    for name, more in (("with", measured), ("without", {})):
        result = run_recipe("finetune", overrides=settings(world, **more), out=tmp_path / name, registry=REGISTRY)
        weights.append((result.export / "open_clip_model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    (line,) = (tmp_path / "with/stages/00-train/evaluations.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 2 and "core/retrieval.text_to_image_r1" in json.loads(line)
