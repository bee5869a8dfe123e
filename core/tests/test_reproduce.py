"""Repeating a run: the same weights bit for bit, what is otherwise now is told, deterministic kernels on demand."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from clipgraft import environment
from clipgraft import runner as runner_module
from clipgraft.checkpoint import write_export
from clipgraft.errors import ClipgraftError, InputError
from clipgraft.execution import Result, run_recipe
from clipgraft.registry import Registry
from clipgraft.spec import runhook
from clipgraft.testing.tiny import tiny_clip

REGISTRY = Registry.discover(allow=[])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP, 16 captioned pictures, and a finished run on them."""
    folder = tmp_path_factory.mktemp("world")
    write_export(tiny_clip(), folder / "clip")
    g = torch.Generator().manual_seed(0)
    rows = ["image,caption"]
    for i in range(16):
        pixels = torch.randint(0, 256, (40, 40, 3), dtype=torch.uint8, generator=g)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
        rows.append(f"{i}.png,a picture of thing{i}")
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n", "utf-8")
    run_recipe("finetune", overrides=settings(folder), out=folder / "run", registry=REGISTRY)
    return folder


def settings(world: Path, **more: object) -> dict[str, object]:
    base = {"model.from": str(world / "clip"), "data.from": f"csv:{world / 'pairs.csv'}", "train.steps": 2}
    return {**base, "train.batch_size": 8, "train.warmup": 0, "train.lr": 1e-3, "train.log_every": 1, **more}


def repeated(of: Path, out: Path, **more: object) -> Result:
    return run_recipe(repeat=of, out=out, registry=REGISTRY, **more)


def log(result: Result) -> str:
    return (result.run / "log.txt").read_text("utf-8")


def weights(folder: Path) -> bytes:
    return (folder / "export" / "open_clip_model.safetensors").read_bytes()


def record(run: Path) -> dict[str, object]:
    return dict(json.loads((run / "repeat.json").read_text("utf-8")))


@pytest.fixture
def copy(world: Path, tmp_path: Path) -> Path:
    """The finished run, to be tampered with."""
    return Path(shutil.copytree(world / "run", tmp_path / "then"))


@pytest.mark.parametrize("name", ["", "config.yaml"])
def test_a_repeated_run_has_the_same_config_and_the_same_weights(world, tmp_path, name):
    again = repeated(world / "run" / name, tmp_path / "again")
    assert weights(again.run) == weights(world / "run")
    assert (again.run / "config.yaml").read_bytes() == (world / "run" / "config.yaml").read_bytes()
    assert record(again.run) == {"of": str(world / "run"), "differences": [], "same_weights": True}
    assert f"the weights are those of {world / 'run'}, bit for bit" in log(again)


def test_a_changed_setting_is_told_and_the_weights_differ(world, tmp_path):
    again = repeated(world / "run", tmp_path / "again", seed=1, overrides={"train.lr": 2e-3})
    assert weights(again.run) != weights(world / "run")
    lines = ["setting train.lr: 0.001 then, 0.002 now", "setting seed: 0 then, 1 now"]
    assert sorted(record(again.run)["differences"]) == sorted(lines) and record(again.run)["same_weights"] is False
    assert all(f"otherwise than in {world / 'run'}: {line}" in log(again) for line in lines)


def test_every_difference_of_the_machine_is_a_line_and_a_dry_run_shows_them(copy, tmp_path, capsys):
    env = json.loads((copy / "env.json").read_text("utf-8"))
    assert env.keys() >= {"python", "platform", "cpu", "vector_instructions", "device", "threads", "versions"}
    threads = env["threads"]
    env |= {"python": "3.0.0", "cpu": "abacus", "threads": threads + 7, "device": "cuda"}
    env["versions"]["torch"] = "0.0.1"
    (copy / "env.json").write_text(json.dumps(env), "utf-8")
    plugins = [{"name": "core", "distribution": "clipgraft", "version": "0.0.1"}]
    (copy / "plugins.json").write_text(json.dumps([*plugins, {"name": "gone", "version": "1"}]), "utf-8")
    assert repeated(copy, tmp_path / "again", dry_run=True).status == "dry-run" and not (tmp_path / "again").exists()
    told = capsys.readouterr().err
    for line in (
        f"python: 3.0.0 then, {sys.version.split()[0]} now",
        "cpu: abacus then, ",
        f"threads: {threads + 7} then, {threads} now",
        "device: cuda then, cpu now",
        "versions.torch: 0.0.1 then, ",
        "plugin core: 0.0.1 then, ",
        "plugin gone: 1 then, null now",
    ):
        assert f"otherwise than in {copy}: {line}" in told


def test_changed_data_and_another_base_are_named_when_the_weights_differ(world, copy, tmp_path):
    data = json.loads((copy / "data.json").read_text("utf-8"))
    assert data["samples"] == 16 and data["from"] == f"csv:{world / 'pairs.csv'}"
    (copy / "data.json").write_text(json.dumps({**data, "fingerprint": "before"}), "utf-8")
    manifest = json.loads((copy / "export" / "clipgraft.json").read_text("utf-8"))
    manifest["files"]["open_clip_model.safetensors"]["sha256"] = "0"
    manifest["lineage"][-1]["base_sha256"] = "1"
    (copy / "export" / "clipgraft.json").write_text(json.dumps(manifest), "utf-8")
    said = log(repeated(copy, tmp_path / "again"))
    assert f"the weights differ from those of {copy}; data fingerprint: before then" in said
    assert "base weights: 1 then" in said


@pytest.mark.parametrize("damage", ["[]", "{", '{"files": 3}', '{"files": {"a.safetensors": 1}, "lineage": []}'])
def test_a_run_whose_records_are_damaged_is_repeated_without_them(copy, tmp_path, damage):
    for name in ("env.json", "plugins.json", "data.json", "export/clipgraft.json"):
        (copy / name).write_text(damage, "utf-8")
    again = repeated(copy, tmp_path / "again")
    assert again.status == "done" and record(again.run)["same_weights"] is None
    assert "left no export to compare with" in log(again)


def test_what_is_no_run_is_one_clear_line(world, copy, tmp_path):
    def said(of: Path, **more: object) -> str:
        with pytest.raises(InputError) as error:
            run_recipe(repeat=of, out=tmp_path / "again", registry=REGISTRY, **more)
        assert not (tmp_path / "again").exists()
        return str(error.value)

    assert "is no run directory" in said(tmp_path / "nowhere")
    assert "is no config.yaml of a run" in said(world / "pairs.csv")
    assert "leave RECIPE and --config out" in said(copy, recipe="finetune")
    assert "leave RECIPE and --config out" in said(copy, configs=[copy / "config.yaml"])
    assert "--resume continues a run as it was" in said(copy, resume=copy)
    for damage in ("{", "[]", "{}", '{"recipe": ' + "[" * 100_000):
        (copy / "status.json").write_text(damage, "utf-8")
        assert "status.json is damaged" in said(copy)
    (copy / "status.json").write_text('{"recipe": "core/finetune"}', "utf-8")
    (copy / "config.yaml").write_text("seed: [", "utf-8")
    assert "config.yaml line 1" in said(copy)


# -- deterministic mode --------------------------------------------------------------------------------------------


class Step:
    """A hook around the step, as a method with a custom operation would have one."""

    def __init__(self, work) -> None:
        self.work = work

    @runhook
    def before_step(self, run, stage, step, batch) -> None:
        self.work()


def with_hook(monkeypatch: pytest.MonkeyPatch, work) -> None:
    original = runner_module.Run.__post_init__

    def register(self) -> None:
        original(self)
        self.hooks.register(Step(work), "work")

    monkeypatch.setattr(runner_module.Run, "__post_init__", register)


def flags() -> tuple[bool, bool, bool]:
    cudnn = torch.backends.cudnn
    return torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark


def test_deterministic_runs_use_deterministic_kernels_and_leave_torch_as_it_was(world, tmp_path, monkeypatch):
    before, seen = flags(), []
    with_hook(monkeypatch, lambda: seen.append(flags()))
    run_recipe("finetune", overrides=settings(world, deterministic=True), out=tmp_path / "a", registry=REGISTRY)
    run_recipe("finetune", overrides=settings(world), out=tmp_path / "b", registry=REGISTRY)
    assert seen == [(True, True, False)] * 2 + [before] * 2 and flags() == before
    assert weights(tmp_path / "a") == weights(tmp_path / "b"), "on a CPU the same kernels run"


def test_an_operation_without_a_deterministic_kernel_is_named(world, tmp_path, monkeypatch):
    before = flags()
    with_hook(monkeypatch, lambda: torch.zeros(2).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0])))
    with pytest.raises(ClipgraftError, match="the operation put_ has no deterministic kernel here"):
        run_recipe("finetune", overrides=settings(world, deterministic=True), out=tmp_path / "a", registry=REGISTRY)
    assert flags() == before and json.loads((tmp_path / "a/status.json").read_text())["status"] == "failed"
    assert run_recipe("finetune", overrides=settings(world), out=tmp_path / "b", registry=REGISTRY).status == "done"


def test_other_errors_pass_through_deterministic_mode():
    with pytest.raises(RuntimeError, match="something else"), environment.determinism(True):
        raise RuntimeError("something else")
    assert not torch.are_deterministic_algorithms_enabled()


# -- in processes of their own -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_line_repeats_a_run_whatever_the_hash_seed_of_python(world, tmp_path):
    """Sets are ordered by Python's hash seed: no result may depend on one."""
    for seed in ("1", "2"):
        command = [sys.executable, "-m", "clipgraft", "run", "--from", str(world / "run" / "config.yaml")]
        env = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1", "CLIPGRAFT_PLUGINS": ""}
        done = subprocess.run(
            [*command, "--set", "threads=1", "--out", str(tmp_path / seed), "--json"],
            env=env,
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert "setting threads: null then, 1 now" in done.stderr
    assert weights(tmp_path / "1") == weights(tmp_path / "2")
