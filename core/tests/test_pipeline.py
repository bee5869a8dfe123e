"""Recipes one after another: checked at once, the same as by hand, resumed in the right step, told by name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from clipgraft import pipeline as module
from clipgraft.checkpoint import open_export, read_manifest, write_export
from clipgraft.config.load import load_recipe
from clipgraft.errors import ClipgraftError, InputError, Interrupted
from clipgraft.execution import run_recipe
from clipgraft.registry import Registry, use
from clipgraft.rundir import read_run
from clipgraft.spec import runhook
from clipgraft.testing.tiny import tiny_clip

PLUGIN = """
from clipgraft.spec import Component, hookimpl
from clipgraft.config.schema import RunConfig
from clipgraft.recipe import StagePlan
from clipgraft.stage import JobStage, StageResult


@hookimpl
def clipgraft_recipes():
    return [
        Component(name="read", target="parts:Read", config="parts:ReadConfig", summary="A head"),
        Component(name="fail", target="parts:Fail", config="parts:ReadConfig", summary="Doesn't"),
    ]


@hookimpl
def clipgraft_heads():
    return [Component(name="reader", target="parts:Reader", config="parts:ReaderConfig", summary="A head")]


class ReadConfig(RunConfig):
    width: int = 3
    beside: str = ""


from pydantic import BaseModel
import torch


class ReaderConfig(BaseModel):
    width: int


class Reader(torch.nn.Linear):
    def __init__(self, width):
        super().__init__(width, 1)
        self.registered = ("parts/reader", {"width": width})


class Read:
    def __init__(self, config):
        self.config = config

    def plan(self):
        return [StagePlan("read", lambda run: JobStage("read", self.run))]

    def check(self, run):
        wide = run.encoder.image.width
        return [f"width {self.config.width} is above {wide}"] if self.config.width > wide else []

    def run(self, run):
        return StageResult(components={"reader": Reader(self.config.width)}, metrics={"wide": float(self.config.width)})


class Fail(Read):
    def run(self, run):
        raise RuntimeError("the disk is made of cheese")
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP and 24 captioned pictures."""
    folder = tmp_path_factory.mktemp("world")
    write_export(tiny_clip(), folder / "clip")
    g = torch.Generator().manual_seed(0)
    rows = ["image,caption"]
    for i in range(24):
        pixels = torch.randint(0, 256, (40, 40, 3), dtype=torch.uint8, generator=g)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
        rows.append(f"{i}.png,a picture of thing{i}")
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n")
    (folder / "parts.py").write_text(PLUGIN)
    return folder


@pytest.fixture(scope="module")
def registry(world: Path):
    with use(Registry.discover(allow=[], files=[world / "parts.py"])) as found:
        yield found
    sys.modules.pop("parts", None)


TRAIN = {"steps": 4, "batch_size": 8, "warmup": 0, "lr": 1e-3, "log_every": 1}


def tune(name: str | None = None, **more: Any) -> dict[str, Any]:
    """A step of a few updates."""
    return {"recipe": "finetune", **({"name": name} if name else {}), "set": {"train": TRAIN, **more}}


def settings(world: Path, *steps: Any, **more: Any) -> dict[str, Any]:
    data = f"csv:{world / 'pairs.csv'}"
    return {"model.from": str(world / "clip"), "data.from": data, "steps": list(steps), **more}


def weights(folder: Path) -> bytes:
    return (folder / "open_clip_model.safetensors").read_bytes()


def test_a_pipeline_is_its_recipes_by_hand(world, registry, tmp_path):
    done = run_recipe(
        "pipeline",
        overrides=settings(world, tune("one"), tune("two", **{"train.lr": 5e-4})),
        out=tmp_path / "run",
        seed=3,
        registry=registry,
    )
    assert done.status == "done" and done.steps == 8
    by_hand, model = [], world / "clip"
    for number, lr in enumerate((1e-3, 5e-4)):
        changes = {"model.from": str(model), "data.from": f"csv:{world / 'pairs.csv'}"}
        changes |= {f"train.{key}": value for key, value in TRAIN.items()} | {"train.lr": lr}
        one = run_recipe("finetune", overrides=changes, seed=3, out=tmp_path / str(number), registry=registry)
        by_hand.append(weights(one.export))
        model = one.export
    assert by_hand == [weights(tmp_path / "run/steps" / name / "export") for name in ("00-one", "01-two")]
    assert weights(done.export) == by_hand[-1] != by_hand[0]
    manifest = read_manifest(done.export)
    assert [entry["recipe"] for entry in manifest["lineage"]] == ["core/finetune"] * 2
    first = read_manifest(tmp_path / "run/steps/00-one/export")
    assert manifest["lineage"][1]["base_sha256"] == first["files"]["open_clip_model.safetensors"]["sha256"]
    assert manifest["lineage"][1]["base"].endswith("steps/00-one/export")
    assert [log.name for log in read_run(done.run).stages] == ["00-one/00-train", "01-two/00-train"]
    for step in ("00-one", "01-two"):  # each has all that a report reads
        names = {p.name for p in (tmp_path / "run/steps" / step).iterdir()}
        assert {"config.yaml", "env.json", "plugins.json", "log.txt", "status.json", "stages", "export"} <= names


def test_it_is_measured_over_the_whole_and_between(world, registry, tmp_path):
    evaluate = {"on": ["core/retrieval"], "data": f"csv:{world / 'pairs.csv'}", "every_stage": True}
    done = run_recipe(
        "pipeline",
        overrides=settings(world, tune("one"), {**tune("two"), "measure": True}, evaluate=evaluate),
        out=tmp_path / "run",
        registry=registry,
    )
    told = json.loads((done.run / "evaluations.json").read_text())
    assert list(told) == ["before", "after-one", "after"]
    assert done.metrics == {f"core/retrieval.{k}": v for k, v in told["after"]["core/retrieval"].items()}
    assert not (done.run / "steps/00-one/evaluations.json").exists(), "steps measure when they are told to"


def test_steps_see_earlier_models_by_name(world, registry, tmp_path):
    steps = [tune("left"), tune("right", **{"model.from": "@start", "train.lr": 5e-4}), tune("end", teacher="@left")]
    done = run_recipe("pipeline", overrides=settings(world, *steps), out=tmp_path / "run", registry=registry)
    configs = [yaml.safe_load((p / "config.yaml").read_text()) for p in sorted((done.run / "steps").iterdir())]
    assert configs[1]["model"]["from"] == str(world / "clip")
    assert configs[2]["model"]["from"] == str(done.run / "steps/01-right/export")
    assert configs[2]["teacher"] == str(done.run / "steps/00-left/export")
    assert len(read_manifest(done.export)["lineage"]) == 2, "of @right and of itself; @left only taught"


def test_a_step_may_be_its_recipes_name_alone(world, registry):
    _, config = load_recipe("pipeline", overrides=["steps=[finetune]", "model.from=x"], registry=registry)
    assert config.steps[0].recipe == config.steps[0].called == "finetune" and config.steps[0].set == {}
    changes = ["steps=[finetune]", "model.from=x", "steps.0.set.train.steps=3", "steps.0.name=mine"]
    _, config = load_recipe("pipeline", overrides=changes, registry=registry)
    assert config.steps[0].recipe == "finetune" and config.steps[0].called == "mine"
    assert config.steps[0].set == {"train": {"steps": 3}}


def test_what_a_step_trained_beside_the_encoder_ships_while_the_encoder_stays(world, registry, tmp_path):
    read = {"recipe": "parts/read"}
    kept = run_recipe(
        "pipeline",
        overrides=settings(world, tune(), read, {**read, "name": "again", "set": {"width": 5}}),
        out=tmp_path / "kept",
        registry=registry,
    )
    (record,) = read_manifest(kept.export)["components"]
    assert record["config"] == {"width": 5}, "the later of one name"
    lost = run_recipe("pipeline", overrides=settings(world, read, tune()), out=tmp_path / "lost", registry=registry)
    assert read_manifest(lost.export)["components"] == []
    assert "reader stays in" in (lost.run / "log.txt").read_text()
    assert read_manifest(lost.run / "steps/00-read/export")["components"]


def test_a_dry_run_tells_every_problem_of_every_step_and_does_nothing(world, registry, tmp_path):
    steps = [
        {"recipe": "finetun", "name": "typo"},
        tune("two", loss_weights=[1.0, 2.0]),
        tune("three", **{"train.stepz": 3}),
        {"recipe": "read", "set": {"width": 99}},
        tune("five", teacher="@six"),
    ]
    with pytest.raises(InputError) as told:
        run_recipe("pipeline", overrides=settings(world, *steps), out=tmp_path / "run", dry_run=True, registry=registry)
    message = str(told.value)
    for part in (
        "step typo: unknown recipe 'finetun'; did you mean finetune?",
        "step two: loss_weights has 2 entries for 1 losses",
        "step three: unknown key train.stepz; did you mean train.steps",
        "step read: width 99 is above 32;  (checked on @start",
        "step five: @six is no model before this step; known: @start, @typo, @two, @three, @read",
    ):
        assert part in message, part
    assert "\n" not in message and not (tmp_path / "run").exists()


def test_a_dry_run_lists_the_stages_of_the_steps(world, registry, tmp_path, capsys):
    changes = settings(world, tune("one"), {"recipe": "read"})
    run_recipe("pipeline", overrides=changes, out=tmp_path / "run", dry_run=True, registry=registry)
    said = capsys.readouterr().err
    assert "would run stage one (finetune: train)" in said and "would run stage read (read: read)" in said
    assert not (tmp_path / "run").exists()


def test_a_late_step_is_checked_at_its_turn(world, registry, tmp_path):
    late = {"recipe": "read", "late": True, "set": {"width": 99}}
    with pytest.raises(InputError, match=r"^step read: width 99 is above 32$"):
        run_recipe("pipeline", overrides=settings(world, tune(), late), out=tmp_path / "run", registry=registry)
    assert json.loads((tmp_path / "run/steps/00-finetune/status.json").read_text())["status"] == "done"


@pytest.mark.parametrize(("more", "message"), [
    ({"steps": []}, "steps must"),
    ({"steps": ["finetune", "finetune"]}, "two models of the pipeline are called finetune; give each step a name"),
    ({"steps": [{"recipe": "finetune", "name": "start"}]}, "two models of the pipeline are called start"),
    ({"steps": [{"recipe": "finetune", "sett": {}}]}, "unknown key steps.0.sett; did you mean steps.0.set"),
    ({"grafts": ["freeze"]}, "grafts belong to a step; move them to steps.N.set.grafts"),
    ({"trackers": ["tensorboard"]}, "trackers belong to a step"),
])  # fmt: skip
def test_refusals(world, registry, tmp_path, more, message):
    with pytest.raises(InputError, match=message):
        run_recipe(
            "pipeline", overrides=settings(world, tune()) | more, out=tmp_path / "r", dry_run=True, registry=registry
        )


def test_a_failure_names_its_step_and_the_rest_is_kept(world, registry, tmp_path):
    changes = settings(world, tune(), {"recipe": "fail"})
    with pytest.raises(ClipgraftError, match=r"^step fail: RuntimeError: the disk is made of cheese"):
        run_recipe("pipeline", overrides=changes, out=tmp_path / "run", registry=registry)
    assert json.loads((tmp_path / "run/status.json").read_text())["status"] == "failed"
    assert json.loads((tmp_path / "run/steps/00-finetune/status.json").read_text())["status"] == "done"


class StopAt:
    """Asks to stop after an update of a run whose path ends with ``where``."""

    def __init__(self, where: str, step: int) -> None:
        self.where, self.step = where, step

    @runhook
    def after_step(self, run, stage, step, output) -> None:
        run.stop_requested |= run.path.name == self.where and step + 1 == self.step


@pytest.mark.parametrize("where", ["00-one", "01-two"])
def test_an_interrupted_pipeline_goes_on_in_its_step(world, registry, tmp_path, monkeypatch, where):
    evaluate = {"on": ["core/retrieval"], "data": f"csv:{world / 'pairs.csv'}"}
    changes = settings(world, tune("one"), tune("two"), {"recipe": "read"}, evaluate=evaluate)
    whole = run_recipe("pipeline", overrides=changes, out=tmp_path / "whole", registry=registry)
    original = module.Run.__post_init__

    def with_hook(self) -> None:
        original(self)
        self.hooks.register(StopAt(where, 2), "stop")

    with monkeypatch.context() as patch:
        patch.setattr(module.Run, "__post_init__", with_hook)
        with pytest.raises(Interrupted) as stopped:
            run_recipe("pipeline", overrides=changes, out=tmp_path / "run", registry=registry)
    name = where[3:]
    assert (
        str(stopped.value) == f"step {name}: stopped in train after step 2; continue with --resume {tmp_path / 'run'}"
    )
    assert json.loads((tmp_path / "run/status.json").read_text())["status"] == "interrupted"
    again = run_recipe(resume=tmp_path / "run", registry=registry)
    assert weights(again.export) == weights(whole.export) and again.metrics == whole.metrics
    assert read_manifest(again.export)["components"][0]["name"] == "reader"
    log = (tmp_path / f"run/steps/{where}/log.txt").read_text()
    assert "train: resumed after step 2" in log
    third = run_recipe(resume=tmp_path / "run", registry=registry)
    assert third.steps == 8 and weights(third.export) == weights(whole.export), "resuming what is done is harmless"


def test_a_stop_between_steps_begins_no_other(world, registry, tmp_path, monkeypatch):
    original = module.Pipeline._components
    changes = settings(world, tune("one"), tune("two"))

    def stopping(self, run, number):
        result = run_step(self, run, number=number)
        run.stop_requested = True
        return result

    run_step = module.Pipeline._run
    with monkeypatch.context() as patch:
        patch.setattr(module.Pipeline, "_run", lambda self, run, *, number: stopping(self, run, number))
        with pytest.raises(Interrupted, match="stopped before step two; continue with --resume"):
            run_recipe("pipeline", overrides=changes, out=tmp_path / "run", registry=registry)
    assert not (tmp_path / "run/steps/01-two").exists() and original is module.Pipeline._components
    assert run_recipe(resume=tmp_path / "run", registry=registry).status == "done"


def test_a_step_folder_of_a_dead_process_is_begun_again(world, registry, tmp_path):
    """Killed between making the folder and saying that it runs."""
    changes = settings(world, tune("one"))
    whole = run_recipe("pipeline", overrides=changes, out=tmp_path / "whole", registry=registry)
    (tmp_path / "run/steps/00-one").mkdir(parents=True)
    for name in ("config.yaml", "status.json"):
        (tmp_path / "run" / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    (tmp_path / "run/steps/00-one/config.yaml").write_text("half a li")
    again = run_recipe(resume=tmp_path / "run", registry=registry)
    assert weights(again.export) == weights(whole.export)


def test_a_pipeline_inside_a_pipeline(world, registry, tmp_path):
    inner = {"recipe": "pipeline", "set": {"steps": [tune("a"), {"recipe": "read"}]}}
    done = run_recipe("pipeline", overrides=settings(world, inner), out=tmp_path / "run", registry=registry)
    assert done.steps == 4 and read_manifest(done.export)["components"][0]["name"] == "reader"
    assert (done.run / "steps/00-pipeline/steps/00-a/export").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_signal_in_the_second_step(world, tmp_path, number):
    (tmp_path / "plan.yaml").write_text(
        yaml.safe_dump(
            {
                "model": {"from": str(world / "clip")},
                "data": {"from": f"csv:{world / 'pairs.csv'}"},
                "steps": [tune("one"), tune("two", **{"train.steps": 300, "train.save_every": 10})],
            }
        )
    )
    environment = {**os.environ, "CLIPGRAFT_PLUGINS": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "clipgraft", "run"]
    start = [*command, "pipeline", "--config", str(tmp_path / "plan.yaml"), "--out"]
    metrics = tmp_path / "run/steps/01-two/stages/00-train/metrics.jsonl"
    process = subprocess.Popen([*start, tmp_path / "run"], env=environment, stderr=subprocess.PIPE)
    until = time.monotonic() + 90
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 25) and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 130 and b"Traceback" not in error, error.decode()
        assert b"error: step two: stopped in train after step" in error
        assert f"continue with --resume {tmp_path / 'run'}\n" in error.decode()
    assert not (tmp_path / "run/export").exists()
    subprocess.run([*command, "--resume", tmp_path / "run"], env=environment, check=True, capture_output=True)
    subprocess.run([*start, tmp_path / "whole"], env=environment, check=True, capture_output=True)
    assert weights(tmp_path / "run/export") == weights(tmp_path / "whole/export")


@pytest.mark.slow
def test_two_processes_run_a_pipeline_like_one(world, tmp_path):
    (tmp_path / "plan.yaml").write_text(
        yaml.safe_dump(
            {
                "model": {"from": str(world / "clip")},
                "data": {"from": f"csv:{world / 'pairs.csv'}"},
                "evaluate": {"on": ["core/retrieval"], "data": f"csv:{world / 'pairs.csv'}"},
                "steps": [tune("one", **{"train.optimizer": "sgd"}), tune("two", **{"train.optimizer": "sgd"})],
            }
        )
    )
    environment = {**os.environ, "CLIPGRAFT_PLUGINS": "", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for name, launch in (("one", []), ("two", torchrun)):
        words = [*launch, "-m", "clipgraft", "run", "pipeline", "--config", tmp_path / "plan.yaml", "--json"]
        done = subprocess.run(
            [sys.executable, *words, "--out", tmp_path / name], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert json.loads(done.stdout)["steps"] == 8, "one process speaks"
    assert json.loads((tmp_path / "two/steps/01-two/env.json").read_text())["processes"] == 2
    one, two = (open_export(tmp_path / name / "export").state_dict() for name in ("one", "two"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
