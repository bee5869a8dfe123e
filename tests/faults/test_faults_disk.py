"""SIGKILL, a full disk and a read-only one, at seeded random changes, in five kinds of work; then the command again."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]


@dataclass(frozen=True)
class Job:
    """``args(world, place)`` of a command that works in ``place``; ``result(place)``, what must not depend on kills.

    ``old``: the command replaces an export; until it is done the old one is there, whole.
    """

    args: Callable[[Path, Path], list[Any]]
    result: Callable[[Path], Any]
    needs: str = ""
    old: bool = False
    tidy: bool = False
    """Nothing temporary is left either; other commands may leave a hidden ``.NAME.xxxxxxxx.tmp``."""


def trained(place: Path) -> Any:
    """Weights, logged lines without seconds, and what was measured."""
    run = place / "run"
    rows = [json.loads(line) for line in (run / "stages/00-train/metrics.jsonl").read_text().splitlines()]
    during = (run / "stages/00-train/evaluations.jsonl").read_text().splitlines()
    weights = (run / "export/open_clip_model.safetensors").read_bytes()
    status = {k: v for k, v in json.loads((run / "status.json").read_text()).items() if k != "seconds"}
    without = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    return weights, without, during, json.loads((run / "evaluations.json").read_text()), status


def train(world: Path, place: Path) -> list[Any]:
    """Five steps that are saved at 2 and 4 and measured at 1, 2, 3, 4."""
    sets = {
        "model.from": world / "a", "data.from": f"csv:{world / 'pairs.csv'}", "train.steps": 5, "train.batch_size": 4,
        "train.warmup": 0, "train.lr": 1e-3, "train.log_every": 1, "train.save_every": 2, "train.evaluate_every": 1,
        "evaluate.on": '[{"use": "core/retrieval"}]', "evaluate.data": f"csv:{world / 'pairs.csv'}",
    }  # fmt: skip
    return ["run", "finetune", *(f"--set={k}={v}" for k, v in sets.items()), "--out", place / "run"]


def embed(suffix: str) -> Callable[[Path, Path], list[Any]]:
    """Three parts and the file."""
    how = ["--batch-size", "2", "--shard-size", "4", "--workers", "0"]
    return lambda world, place: [
        "embed", world / "a", "--data", f"folder:{world / 'pictures'}", *how, "--out", place / f"rows{suffix}"
    ]  # fmt: skip


JOBS = {
    "training": Job(train, trained, tidy=True),
    "caching": Job(
        lambda world, place: [
            "eval",
            world / "a",
            "--on",
            "retrieval",
            "--data",
            f"csv:{world / 'pairs.csv'}",
            "--cache",
            place / "cache",
            "--out",
            place / "measured",
        ],
        lambda place: {k: v for k, v in _content(place).items() if "/." not in k},
    ),
    "embedding": Job(embed(".safetensors"), lambda place: (place / "rows.safetensors").read_bytes(), "embedding"),
    "embedding-parquet": Job(embed(".parquet"), lambda place: (place / "rows.parquet").read_bytes(), "embedding"),
    "merging": Job(
        lambda world, place: ["merging", "soup", world / "a", world / "b", "--out", place / "out"],
        lambda place: _content(place / "out"),
        "merging",
        old=True,
    ),
    "export": Job(
        lambda world, place: ["export", world / "b", "--out", place / "out"],
        lambda place: _content(place / "out"),
        old=True,
    ),
    "export-huggingface": Job(
        lambda world, place: ["export", world / "b", "--format", "huggingface", "--out", place / "hf"],
        lambda place: _content(place / "hf"),
    ),
}


def _content(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def again(bench: Any, args: list[str], place: Path) -> Any:
    """What a user does after a kill: the same command; where that says so, ``--resume``."""
    ended = bench.run(args, root=place)
    if ended.code == 2 and "--resume" in ended.said:
        ended = bench.run(["run", "--resume", str(place / "run")], root=place)
    return ended


@pytest.fixture
def setting(request, bench, place):
    """(job, its words, how an undisturbed child ended, its result, a function that makes ``place`` fresh)."""
    job = JOBS[request.param]
    if job.needs and importlib.util.find_spec(f"clipgraft_{job.needs}") is None:
        pytest.skip(f"clipgraft-{job.needs} is not installed")
    fresh = place.with_name("fresh")
    fresh.mkdir()
    if job.old:
        shutil.copytree(bench.world / "a", fresh / "out")

    def begin() -> None:
        shutil.rmtree(place)
        shutil.copytree(fresh, place)

    begin()
    args = [str(word) for word in job.args(bench.world, place)]
    whole = bench.run(args, root=place)
    assert whole.code == 0, whole.said
    assert len(whole.changes) > 8, "changes are not counted"
    return job, args, whole, job.result(place), begin


@pytest.mark.parametrize("setting", JOBS, indirect=True)
def test_killed_at_any_change_nothing_is_torn_and_the_same_command_ends_alike(setting, request, bench, place, disk):
    job, args, whole, wanted, begin = setting
    count, fresh = len(whole.changes), place.with_name("fresh")
    assert not disk.litter(place) and not disk.torn(place)
    for number, at in enumerate(bench.moments(count, request.node.callspec.id)):
        begin()
        where = f"killed at change {at} of {count}, {whole.changes[at - 1]}"
        ended = bench.run(args, root=place, kind="kill", at=at)
        assert ended.code == -signal.SIGKILL, f"{where}: {ended.said}"
        assert not disk.torn(place), where
        if job.old:
            assert _content(place / "out") in (_content(fresh / "out"), wanted) or not (place / "out").exists(), where
        if number % 3 == 2:  # every third is killed once more on its way back
            bench.run(args, root=place, kind="kill", at=max(1, at // 2))
            assert not disk.torn(place), where
        ended = again(bench, args, place)
        assert ended.code == 0, f"{where}: {ended.said}"
        assert job.result(place) == wanted, f"{where}: another result"
        assert not disk.torn(place), where
        left = [found for found in disk.litter(place) if job.tidy or not found.endswith(".tmp")]
        assert not left, f"{where}: {left}"


@pytest.mark.parametrize("setting", JOBS, indirect=True)
def test_a_disk_that_fills_up_is_one_line_and_the_same_command_goes_on_with_room(setting, request, bench, place, disk):
    job, args, whole, wanted, begin = setting
    fresh = place.with_name("fresh")
    for at in bench.moments(len(whole.changes), f"full/{request.node.callspec.id}", bench.few):
        begin()
        where = f"full from change {at}, {whole.changes[at - 1]}"
        ended = bench.run(args, root=place, kind="full", at=at)
        assert not disk.torn(place), where
        if ended.code == 0:  # what came after needed no room, or could be left out
            assert job.result(place) == wanted or "not kept" in ended.said, where
            continue
        assert ended.code in (1, 2) and len(ended.errors) == 1, f"{where}: {ended.said}"
        assert "No space left" in ended.errors[0] and "Traceback" not in ended.said, f"{where}: {ended.said}"
        assert "--debug" not in ended.errors[0], f"{where}: not foreseen: {ended.said}"
        if job.old:
            assert _content(place / "out") == _content(fresh / "out"), where
        ended = again(bench, args, place)
        assert ended.code == 0, f"{where}: {ended.said}"
        assert job.result(place) == wanted, f"{where}: another result"


@pytest.mark.parametrize("setting", JOBS, indirect=True)
def test_a_read_only_folder_is_one_line_and_stays_as_it_is(setting, bench, place):
    _, args, _, _, begin = setting
    begin()
    ended = bench.run(args, root=place, kind="read-only", at=1)
    assert ended.code in (1, 2) and len(ended.errors) == 1, ended.said
    assert "Read-only file system" in ended.errors[0] and "--debug" not in ended.errors[0], ended.said
    assert _content(place) == _content(place.with_name("fresh"))


@pytest.fixture
def small_disk(place):
    """``place`` as a file system of its own, to be made small, large or read-only; skipped where it can't be."""
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=640k", "tmpfs"]
    if mount is None or subprocess.run([mount, *options, place], capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs here")
    try:
        yield lambda how: subprocess.run([mount, "-o", f"remount,{how}", place], check=True, capture_output=True)
    finally:
        subprocess.run(["umount", "-l", place], check=True, capture_output=True)


@pytest.mark.parametrize("name", ["training", "embedding", "merging", "export"])
def test_a_real_disk_that_is_full_or_read_only(name, bench, place, disk, small_disk, tmp_path):
    """The same on a tmpfs: what is said comes from the system, also through libraries that write on their own."""
    job, roomy = JOBS[name], tmp_path / "roomy"
    if job.needs and importlib.util.find_spec(f"clipgraft_{job.needs}") is None:
        pytest.skip(f"clipgraft-{job.needs} is not installed")
    roomy.mkdir()
    assert bench.run([str(word) for word in job.args(bench.world, roomy)], root=roomy).code == 0
    args = [str(word) for word in job.args(bench.world, place)]
    small_disk("ro")
    ended = bench.run(args, root=tmp_path / "nothing")
    assert ended.code in (1, 2) and len(ended.errors) == 1 and "Read-only file system" in ended.errors[0], ended.said
    small_disk("rw")
    filler = place / "filler"
    free = shutil.disk_usage(place).free
    filler.write_bytes(b"x" * max(0, free - 200_000 if name != "embedding" else free - 5_000))
    ended = bench.run(args, root=tmp_path / "nothing")
    assert ended.code in (1, 2) and len(ended.errors) == 1, ended.said
    assert "No space left" in ended.errors[0] or "GB free" in ended.errors[0], ended.said
    assert "--debug" not in ended.errors[0] and not disk.torn(place), ended.said
    filler.unlink()
    small_disk("size=20m")
    ended = again(bench, args, place)
    assert ended.code == 0, ended.said
    if name != "training":
        found, wanted = job.result(place), job.result(roomy)
        assert found == wanted
    else:
        assert job.result(place)[:2] == job.result(roomy)[:2]
