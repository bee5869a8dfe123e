"""What kills, full disks and damage leave behind, case by case; tests/faults tries random moments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from clipgraft import files
from clipgraft.config.schema import TrainConfig
from clipgraft.errors import ClipgraftError, lost_process
from clipgraft.execution import _begun_at_most
from clipgraft.log import MetricsFile
from clipgraft.optim import build_optimizer
from clipgraft.stage import TrainStage
from clipgraft.state import TrainState
from clipgraft.types import Batch, StepOutput


class Small(TrainStage):
    """One matrix."""

    def __init__(self) -> None:
        super().__init__("small", train=TrainConfig(steps=4, batch_size=1, lr=1e-3), source=[])
        self.out = nn.Linear(3, 2)

    def forward(self, batch: Batch) -> StepOutput:
        raise AssertionError("is never trained")


def state(folder) -> TrainState:
    stage = Small()
    return TrainState(folder, stage, build_optimizer(stage, stage.train_config), None)


def cut(folder) -> None:
    file = folder / "stage.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_a_damaged_state_of_a_later_step_never_outlives_the_good_ones(tmp_path):
    """States 4 and 6; 6 is cut in half; the run goes on after 4 and is stopped at 5: that one must stay."""
    for step in (4, 6):
        state(tmp_path).save(step, keep=2, extra={})
    cut(tmp_path / "step-00000006")
    again = state(tmp_path)
    assert again.load_newest()["step"] == 4 and [p.name for p in again.damaged] == ["step-00000006"]
    again.save(5, keep=1, extra={})
    assert [p.name for p in again.saved()] == ["step-00000005"]
    assert state(tmp_path).load_newest()["step"] == 5


def test_when_every_state_is_damaged_nothing_is_loaded_and_all_are_named(tmp_path):
    for step in (2, 4):
        state(tmp_path).save(step, keep=2, extra={})
        cut(tmp_path / f"step-{step:08d}")
    again = state(tmp_path)
    assert again.load_newest() is None and len(again.damaged) == 2


def test_metrics_are_rewritten_in_one_rename(tmp_path, monkeypatch):
    """A resume that dies while it drops the lines of steps to be done again leaves the others."""
    file = tmp_path / "metrics.jsonl"
    text = "".join(json.dumps({"step": k}) + "\n" for k in range(1, 6)) + '{"step": 6, "lo'
    file.write_text(text)

    def die(self, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", die)
        with pytest.raises(OSError, match="No space"):
            MetricsFile(file, is_main=True, after_step=4)
    assert file.read_text() == text
    MetricsFile(file, is_main=True, after_step=4)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3, 4]


def test_a_full_disk_seen_from_safetensors_is_one_line_with_the_folder(tmp_path, monkeypatch):
    """Their error is no OSError; nothing appears under the final name."""
    from safetensors import SafetensorError

    def full(*args, **more):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with (
        pytest.raises(ClipgraftError, match=r"out could not be written: .*No space left on device") as error,
        files.whole_folder(tmp_path / "out") as draft,
    ):
        files.write_tensors(draft / "x.safetensors", {"x": torch.zeros(2)})
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("names", "anew"), [
    ([], True),
    (["env.json"], True),
    (["env.json", "plugins.json", "command.txt", "config.yaml"], True),
    ([".env.json.0a1b2c3d.tmp"], True),
    (["config.yaml"], False),
    (["env.json", "status.json"], False),
    (["env.json", "thesis.tex"], False),
])  # fmt: skip
def test_only_a_folder_of_a_run_that_never_began_is_begun_anew(tmp_path, names, anew):
    """A config.yaml alone is somebody's own; whatever a run doesn't write keeps the folder from being used."""
    for name in names:
        (tmp_path / name).write_text("")
    assert _begun_at_most(tmp_path) == anew


@pytest.mark.parametrize(("error", "said"), [
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "reads data was killed"),
    (RuntimeError("[..]/pair.cc:534] Connection closed by peer [127.0.0.1]:4242"), "another process"),
    (RuntimeError("shapes differ"), ""),
    (OSError("Broken pipe"), ""),
])  # fmt: skip
def test_a_lost_process_is_told_apart_from_other_errors(error, said):
    assert (said in lost_process(error)) and bool(lost_process(error)) == bool(said)


def test_a_folder_is_removed_in_one_rename(tmp_path, monkeypatch):
    """Killed amid the removal, nothing is left under the name; the next removal takes what is left besides."""
    folder = tmp_path / "step-1"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "a").write_text("a")
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", lambda *args, **options: None)
        files.remove_folder(folder)
    assert not folder.exists() and len(list(tmp_path.iterdir())) == 1
    files.remove_folder(folder)
    assert not list(tmp_path.iterdir())


def test_what_took_its_place_is_not_told_as_failed(tmp_path, monkeypatch):
    """The folder is whole under its name when only the last sync, of what holds it, fails."""
    sync = files._sync

    def full(path: Path) -> None:
        if path == tmp_path:
            raise OSError(28, "No space left on device")
        sync(path)

    monkeypatch.setattr(files, "_sync", full)
    with files.whole_folder(tmp_path / "out") as new:
        (new / "a").write_text("a")
    files.verify(tmp_path / "out")
