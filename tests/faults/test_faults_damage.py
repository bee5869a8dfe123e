"""Damaged states, exports and shards, killed workers and ranks, a NaN batch, a clock that jumps."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]


def words(world: Path, out: Path, **more: Any) -> list[str]:
    """Six steps, saved at every second one."""
    sets = {
        "model.from": world / "a", "data.from": f"csv:{world / 'pairs.csv'}", "train.steps": 6, "train.batch_size": 4,
        "train.warmup": 0, "train.lr": 1e-3, "train.log_every": 1, "train.save_every": 2, **more,
    }  # fmt: skip
    return ["run", "finetune", *(f"--set={k}={v}" for k, v in sets.items()), "--out", str(out)]


def result(run: Path) -> Any:
    """Weights and logged lines without seconds."""
    rows = [json.loads(line) for line in (run / "stages/00-train/metrics.jsonl").read_text().splitlines()]
    without = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    return (run / "export/open_clip_model.safetensors").read_bytes(), without


@pytest.fixture(scope="module")
def whole(bench, tmp_path_factory):
    """What six undisturbed steps leave."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert bench.run(words(bench.world, out), root=out.parent).code == 0
    return result(out)


def one_line(ended: Any, *said: str) -> str:
    """The one error line of a command that failed."""
    assert ended.code in (1, 2) and len(ended.errors) == 1 and "Traceback" not in ended.said, ended.said
    for text in said:
        assert text in ended.errors[0], ended.errors[0]
    assert "--debug" not in ended.errors[0], ended.errors[0]
    return ended.errors[0]


def poison(step: int, what: str) -> Any:
    """In a child, before the command: ``what`` happens at that forward pass of training."""
    from clipgraft.finetune import FinetuneStage

    encode, calls = FinetuneStage.encode, []

    def encoded(self: Any, batch: Any) -> Any:
        calls.append(1)
        if len(calls) == step:
            if what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            batch.pixels[1] = float("nan")
        return encode(self, batch)

    FinetuneStage.encode = encoded  # type: ignore[method-assign]


def states(run: Path) -> list[Path]:
    return sorted((run / "stages/00-train/state").glob("step-*"))


def test_every_file_of_a_state_cut_in_half_or_gone_is_told_and_the_state_before_it_taken(bench, place, whole):
    run = place / "run"
    ended = bench.run(words(bench.world, run), root=place, before=lambda: poison(6, "kill"))
    assert ended.code == -signal.SIGKILL and [p.name[-1] for p in states(run)] == ["2", "4"]
    kept = place / "kept"
    run.rename(kept)
    for number, name in enumerate(sorted(p.name for p in states(kept)[-1].iterdir())):
        shutil.copytree(kept, run)
        file = states(run)[-1] / name
        if number % 2:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        else:
            file.unlink()
        ended = bench.run(["run", "--resume", str(run)], root=place)
        assert ended.code == 0, f"{name}: {ended.said}"
        assert "step-00000004 is damaged and passed over; going on after step 2" in ended.said, name
        assert result(run) == whole, name
        shutil.rmtree(run)


def test_an_export_with_any_file_cut_in_half_is_refused_in_one_line(bench, place):
    for name in sorted(p.name for p in (bench.world / "a").iterdir() if p.name != "README.md"):
        shutil.copytree(bench.world / "a", place / "cut")
        file = place / "cut" / name
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        one_line(bench.run(["export", str(place / "cut"), "--out", str(place / "out")], root=place), "cut")
        assert not (place / "out").exists(), name
        shutil.rmtree(place / "cut")


@pytest.fixture
def shards(bench, place):
    """Two tar files of six pictures with captions."""
    pytest.importorskip("clipgraft_data")
    for shard in range(2):
        with tarfile.open(place / f"{shard}.tar", "w") as tar:
            for k in range(6 * shard, 6 * shard + 6):
                picture = (bench.world / "pictures" / f"{k:02}.png").read_bytes()
                for name, content in ((f"{k:02}.png", picture), (f"{k:02}.txt", b"a picture of one thing")):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return f"wds:{place}/{{0..1}}.tar"


def test_a_shard_cut_in_half_or_with_noise_in_it_is_one_line_with_its_name(bench, place, shards):
    args = words(bench.world, place / "run", **{"data.from": shards})
    assert bench.run(args, root=place).code == 0
    good = (place / "1.tar").read_bytes()
    for number, bad in enumerate((good[: len(good) // 2], good[:700] + b"\xff" * 3000 + good[3700:], b"")):
        shutil.rmtree(place / "run")
        (place / "1.tar").write_bytes(bad)
        ended = bench.run(args, root=place)
        told = one_line(ended)
        assert "1.tar" in told or "can't be read" in told, f"{number}: {told}"


def test_parts_and_caches_that_are_cut_in_half_are_made_again(bench, place):
    pytest.importorskip("clipgraft_embedding")
    options = ["--batch-size", "2", "--shard-size", "4", "--workers", "0"]
    args = ["embed", str(bench.world / "a"), "--data", f"folder:{bench.world / 'pictures'}", *options]
    assert bench.run([*args, "--out", str(place / "whole.safetensors")], root=place).code == 0
    changes = bench.run([*args, "--out", str(place / "rows.safetensors")], root=place).changes
    (place / "rows.safetensors").unlink()
    last = max(k for k, what in enumerate(changes, start=1) if what.startswith("os.rename")) - 1
    assert bench.run([*args, "--out", str(place / "rows.safetensors")], root=place, kind="kill", at=last).code < 0
    parts = sorted((place / ".rows.safetensors.parts").glob("part-*.safetensors"))
    assert len(parts) == 3
    parts[1].write_bytes(parts[1].read_bytes()[: parts[1].stat().st_size // 2])
    assert bench.run([*args, "--out", str(place / "rows.safetensors")], root=place).code == 0
    assert (place / "rows.safetensors").read_bytes() == (place / "whole.safetensors").read_bytes()
    cache = ["--cache", str(place / "cache"), "--json"]
    measure = ["eval", str(bench.world / "a"), "--on", "retrieval", "--data", f"csv:{bench.world / 'pairs.csv'}"]
    first = bench.run([*measure, *cache], root=place)
    for file in list((place / "cache").rglob("*.safetensors")):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    assert bench.run([*measure, *cache], root=place).said.splitlines()[-1] == first.said.splitlines()[-1]


def test_a_killed_data_worker_is_one_line_and_the_resumed_run_is_the_same(bench, place, whole):
    """The first worker kills itself at its third batch, as the system does when memory runs out."""

    def dies() -> None:
        from torch.utils.data import get_worker_info

        from clipgraft.data.loader import TrainLoader

        get = TrainLoader.__getitem__

        def getting(self: Any, number: int) -> Any:
            if number == 4 and get_worker_info() is not None:
                time.sleep(0.2)  # what was read before has arrived
                os.kill(os.getpid(), signal.SIGKILL)
            return get(self, number)

        TrainLoader.__getitem__ = getting  # type: ignore[method-assign]

    run = place / "run"
    ended = bench.run(words(bench.world, run, **{"data.workers": 2}), root=place / "nothing", before=dies)
    one_line(ended, "process that reads data was killed", "--resume")
    assert json.loads((run / "status.json").read_text())["status"] == "failed"
    ended = bench.run(["run", "--resume", str(run)], root=place / "nothing")
    assert ended.code == 0, ended.said
    assert result(run) == whole


def test_a_nan_batch_is_one_line_before_the_update_and_the_resumed_run_is_the_same(bench, place, whole):
    run = place / "run"
    ended = bench.run(words(bench.world, run), root=place, before=lambda: poison(4, "nan"))
    one_line(ended, "the loss is nan at step 4", "nothing was updated", "nonfinite-0.json")
    assert len(json.loads((run / "stages/00-train/nonfinite-0.json").read_text())["ids"]) == 4
    assert states(run)[-1].name == "step-00000003", "the state before the step"
    ended = bench.run(["run", "--resume", str(run)], root=place)
    assert ended.code == 0 and "resumed after step 3" in ended.said, ended.said
    assert result(run) == whole


def jumping() -> None:
    """The wall clock goes back a day, forward ten years, and back, from one look at it to the next."""
    now, looks = time.time, []

    def jumps() -> float:
        looks.append(1)
        return now() + (0, -86_400, 3e8, -3e8)[len(looks) % 4]

    written = time.strftime
    time.time = jumps
    time.strftime = lambda form, *when: written(form, *(when or (time.localtime(jumps()),)))


def test_a_clock_that_jumps_changes_nothing(bench, place, whole):
    run = place / "run"
    ended = bench.run(words(bench.world, run), root=place, kind="kill", at=60, before=jumping)
    assert ended.code == -signal.SIGKILL
    for file in run.rglob("*"):  # and what was written before lies in the future
        os.utime(file, (4e9, 4e9))
    ended = bench.run(["run", "--resume", str(run)], root=place, before=jumping)
    assert ended.code == 0, ended.said
    assert result(run) == whole
    rows = [json.loads(line) for line in (run / "stages/00-train/metrics.jsonl").read_text().splitlines()]
    assert all(0 <= row["seconds"] < 600 for row in rows), "seconds come from a clock that doesn't jump"


def pair(bench: Any, disk: Any, args: list[str], place: Path, *, kill: int | None = None, at: int = 0) -> list[Any]:
    """Both ranks of a command; rank ``kill`` dies at forward pass ``at``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(2):
        scratch = place / f"rank-{rank}"
        scratch.mkdir(exist_ok=True)

        def before(rank: int = rank) -> None:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
            }  # fmt: skip
            from accelerate.state import AcceleratorState

            AcceleratorState._reset_state(True)
            if rank == kill:
                poison(at, "kill")

        child = bench.start(args, root=place / "nothing", before=before, scratch=scratch)
        children.append((child, scratch))
    return [disk.finish(child, scratch=scratch) for child, scratch in children]


@pytest.mark.parametrize("kill", [0, 1])
def test_one_of_two_killed_processes_ends_the_other_in_one_line_and_both_resume_alike(kill, bench, place, disk):
    both = pair(bench, disk, words(bench.world, place / "whole"), place)
    assert [ended.code for ended in both] == [0, 0], both[0].said + both[1].said
    run = place / "run"
    ended = pair(bench, disk, words(bench.world, run), place, kill=kill, at=4)
    assert ended[kill].code == -signal.SIGKILL
    one_line(ended[1 - kill], "another process of this command ended", "--resume")
    assert [p.name[-1] for p in states(run)] == ["2"] and not disk.torn(run)
    again = pair(bench, disk, ["run", "--resume", str(run)], place)
    assert [ended.code for ended in again] == [0, 0], again[0].said + again[1].said
    assert result(run) == result(place / "whole")
    assert torch.get_num_threads() == 1
