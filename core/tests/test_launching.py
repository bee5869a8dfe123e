"""How many processes, and how: settings, Accelerate's file, the environment; too few are refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from clipgraft import launching
from clipgraft.config.schema import DataConfig, DistributedConfig, ModelConfig, RunConfig
from clipgraft.errors import InputError
from clipgraft.launching import Layout, asked_of_launcher, layout, refuse_fewer

FSDP2 = """distributed_type: FSDP
num_processes: 2
mixed_precision: "no"
fsdp_config: {fsdp_version: 2, fsdp_reshard_after_forward: false}
"""


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*launching.COUNTS, "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "FSDP_VERSION"):
        monkeypatch.delenv(name, raising=False)


def config(precision: str = "fp32", **distributed: object) -> RunConfig:
    settings = {"model": ModelConfig(from_="x"), "data": DataConfig(from_="y"), "precision": precision}
    return RunConfig(**settings, distributed=DistributedConfig(**distributed))


def written(folder: Path, text: str) -> str:
    (folder / "launch.yaml").write_text(text)
    return str(folder / "launch.yaml")


def test_settings_and_files_say_how(tmp_path: Path) -> None:
    assert layout(config()) == Layout()
    assert layout(config(processes=3, shard=True)) == Layout(3, shard=True)
    found = layout(config(file=written(tmp_path, FSDP2)))
    assert found == Layout(2, shard=True, reshard=False, origin="launch.yaml")
    assert str(found) == "2 processes, weights split over them (FSDP2)"
    plain = written(tmp_path, FSDP2.replace("FSDP", "MULTI_GPU", 1))
    assert layout(config(file=plain)) == Layout(2, origin="launch.yaml")
    assert layout(config("bf16", file=written(tmp_path, FSDP2.replace('"no"', "bf16")))).shard


@pytest.mark.parametrize(
    ("change", "settings", "said"),
    [
        (("fsdp_version: 2", "fsdp_version: 1"), {}, "launch.yaml: FSDP version 1 is not offered; set fsdp_version: 2"),
        (("fsdp_version: 2, ", ""), {}, "FSDP version 1 is not offered"),
        (("false}", "false, fsdp_offload_params: true}"), {}, "set fsdp_offload_params: false"),
        (("num_processes: 2", "num_processes: none"), {}, "num_processes is 'none'; give the number"),
        (("num_processes", "number"), {}, "Accelerate knows no 'number'"),
        (("FSDP", "MEGATRON_LM"), {}, "distributed_type MEGATRON_LM is not offered; choose MULTI_GPU"),
        (("FSDP", "DEEPSPEED"), {}, r"launch.yaml \(ZeRO stage \?, 2 processes\): DeepSpeed is not .*shard=true"),
        (('"no"', "bf16"), {}, "mixed_precision is bf16, but the run's precision is fp32"),
        (("", ""), {"processes": 4}, "distributed.processes is 4, but launch.yaml says 2"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    tmp_path: Path, change: tuple[str, str], settings: dict[str, int], said: str
) -> None:
    with pytest.raises(InputError, match=said) as caught:
        layout(config(file=written(tmp_path, FSDP2.replace(*change, 1)), **settings))
    assert "\n" not in str(caught.value)


def test_fp16_is_not_sharded() -> None:
    with pytest.raises(InputError, match="set precision to bf16"):
        layout(config("fp16", shard=True))


def test_what_accelerate_launch_sets_is_read_and_hidden_from_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="accelerate launch: FSDP version 1"):
        layout(config())
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert layout(config()) == Layout(shard=True, origin="accelerate launch")
    with launching.hidden_from_accelerate():
        assert "ACCELERATE_USE_FSDP" not in os.environ
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(InputError, match="DeepSpeed is not"):
        layout(config())


def test_fewer_processes_than_asked_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_fewer(Layout())
    refuse_fewer(Layout(1))
    with pytest.raises(InputError, match=r"processes asks for 2 processes but 1 came up; start with torchrun .* 2 -m"):
        refuse_fewer(Layout(2))
    assert asked_of_launcher() == 1
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert asked_of_launcher() == 4


@pytest.mark.slow
@pytest.mark.distributed
def test_accelerate_launch_on_a_cpu_runs_one_process_and_is_refused(tmp_path: Path) -> None:
    """Measured with accelerate 1.15: ``--cpu --num_processes 2`` starts one, silently; the run does not go on."""
    file = written(tmp_path, "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_processes: 2\n")
    sets = ["--set=model.from=open_clip:ViT-B-32", "--set=data.from=csv:x.csv", f"--set=distributed.file={file}"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "clipgraft"]
    environment = {**os.environ, "CLIPGRAFT_PLUGINS": "", "OMP_NUM_THREADS": "1"}
    command = [*launch, "run", "finetune", *sets, "--out", str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "launch.yaml asks for 2 processes but 1 came up" in done.stderr, done.stderr[-2000:]
    assert not (tmp_path / "run").exists()
