"""Faults for commands that run in a forked child: its n-th change of the disk is where it dies, or the disk fills up.

A change is what alters a folder: opening for writing, one write (half of which arrives), fsync, rename, removal, a new
folder. Their number is counted in an undisturbed child, so a moment is a number, and the same seed tries the same ones.
``CLIPGRAFT_FAULTS`` says how many moments each test tries (``nox -s faults``: 50).
"""

from __future__ import annotations

import errno
import io
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from clipgraft import files
from clipgraft.checkpoint import write_export
from clipgraft.cli import main
from clipgraft.errors import ClipgraftError
from clipgraft.testing.tiny import tiny_clip

MOMENTS = int(os.environ.get("CLIPGRAFT_FAULTS", "3"))
SEED = int(os.environ.get("CLIPGRAFT_FAULTS_SEED", "0"))
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}
ERRORS = {"full": errno.ENOSPC, "read-only": errno.EROFS}
PATIENCE = 300
"""Seconds for one command; a fault must never make one wait."""


@dataclass
class Faults:
    """Counts changes below ``root``; ``kind`` "kill" strikes at number ``at``, "full" and "read-only" from there on."""

    root: str
    kind: str = ""
    at: int | None = None
    seen: list[str] = field(default_factory=list)

    def install(self) -> None:
        """For the rest of this process: an audit hook can't be taken off."""
        import safetensors.torch as st

        opened, synced, saved = io.open, os.fsync, st.save_file

        def open_(file: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
            found = opened(file, mode, *args, **more)
            ours = isinstance(file, str | os.PathLike) and self.is_ours(os.fspath(file))
            return Written(found, self, str(file)) if ours and set(mode) & set("wax+") else found

        def fsync(handle: int) -> None:
            self.change("fsync", "")
            synced(handle)

        def save_file(tensors: Any, path: Any, metadata: Any = None) -> None:
            """As safetensors, but killed or refused in the middle."""
            if self.change("save_file", str(path), strikes=False):
                saved(tensors, path, metadata)
                whole = Path(path).read_bytes()
                Path(path).write_bytes(whole[: len(whole) // 2])
                if self.kind == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                os.unlink(path)  # it cleans up after itself
                number = ERRORS[self.kind]
                text = f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})"
                raise st.SafetensorError(text) if hasattr(st, "SafetensorError") else _safetensor_error(text)
            saved(tensors, path, metadata)

        io.open = open_  # type: ignore[assignment]
        import builtins

        builtins.open = open_
        os.fsync = fsync
        st.save_file = save_file
        self.inside = False
        sys.addaudithook(self.heard)

    def is_ours(self, path: str | bytes) -> bool:
        """Whether a path is below ``root``."""
        return os.fsdecode(path).startswith(self.root)

    def heard(self, event: str, args: tuple[Any, ...]) -> None:
        """The audit hook."""
        if event == "open":
            path, _, flags = args
            if isinstance(path, str | bytes) and self.is_ours(path) and flags & WRITING:
                self.change("open", os.fsdecode(path))
        elif event in CHANGES:
            path, relative = args[0], event in ("os.remove", "os.rmdir") and args[1] != -1
            if isinstance(path, str | bytes | os.PathLike) and (relative or self.is_ours(os.fspath(path))):
                self.change(event, os.fsdecode(os.fspath(path)))

    def change(self, what: str, path: str, *, strikes: bool = True) -> bool:
        """Count one; strike if it is time. Returns whether it is."""
        if self.kind == "" or self.inside:
            self.seen.append(f"{what} {path.removeprefix(self.root)}")
            return False
        self.seen.append(f"{what} {path.removeprefix(self.root)}")
        number = len(self.seen)
        assert self.at is not None
        struck = number == self.at if self.kind == "kill" else number >= self.at
        if self.kind == "full" and what in ("os.remove", "os.rmdir", "os.rename"):
            struck = False  # a full disk lets these through
        if struck and strikes:
            if self.kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(ERRORS[self.kind], os.strerror(ERRORS[self.kind]), path or None)
        self.inside = struck  # what the fault itself does isn't counted
        return struck


def _safetensor_error(text: str) -> Exception:
    from safetensors import SafetensorError

    return SafetensorError(text)


class Written:
    """A file open for writing whose every ``write`` is a change; half of the one that strikes arrives."""

    def __init__(self, inner: Any, faults: Faults, path: str) -> None:
        self._inner, self._faults, self._path = inner, faults, path

    def write(self, data: Any) -> Any:
        if self._faults.change("write", self._path, strikes=False):
            self._inner.write(data[: len(data) // 2])
            self._inner.flush()
            if self._faults.kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            number = ERRORS[self._faults.kind]
            raise OSError(number, os.strerror(number))
        return self._inner.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __enter__(self) -> Written:
        self._inner.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._inner.__exit__(*error)

    def __iter__(self) -> Any:
        return iter(self._inner)


@dataclass(frozen=True)
class Ended:
    """How a child ended: exit code, or minus the signal; what it said; the changes it made, unless it was killed."""

    code: int
    said: str
    changes: list[str]

    @property
    def errors(self) -> list[str]:
        """The lines that begin with "error:"."""
        return [line for line in self.said.splitlines() if line.startswith("error:")]


def start(work: Callable[[], Any], *, scratch: Path) -> int:
    """Fork a child that does ``work``, its output in ``scratch``; its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    (scratch / "said").write_bytes(b"")
    (scratch / "changes").write_bytes(b"[]")
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        handle = os.open(scratch / "said", os.O_WRONLY | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(fd, "w"), write_through=True) for fd in (1, 2))
        torch.set_num_threads(1)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def finish(child: int, *, scratch: Path, patience: float = PATIENCE) -> Ended:
    """Wait for a child; one that takes too long is killed and fails the test."""
    until = time.monotonic() + patience
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            break
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail(f"no end within {patience} s:\n{(scratch / 'said').read_text('utf-8', 'replace')[-2000:]}")
        time.sleep(0.005)
    said = (scratch / "said").read_text("utf-8", "replace")
    return Ended(os.waitstatus_to_exitcode(status), said, json.loads((scratch / "changes").read_text("utf-8")))


@dataclass
class Bench:
    """Runs commands in children. ``world``: folders ``a`` and ``b`` (tiny CLIPs), ``pairs.csv`` and its pictures."""

    world: Path
    scratch: Path
    few: int = max(2, MOMENTS // 5)
    """Moments of tests that try several kinds of work, where each costs a second or two."""

    def run(
        self, args: list[str], *, root: Path, kind: str = "", at: int | None = None,
        before: Callable[[], Any] = lambda: None,
    ) -> Ended:  # fmt: skip
        """``clipgraft ARGS`` in a child with a fault below ``root``; ``before`` prepares the child."""
        return finish(self.start(args, root=root, kind=kind, at=at, before=before), scratch=self.scratch)

    def start(
        self, args: list[str], *, root: Path, kind: str = "", at: int | None = None,
        before: Callable[[], Any] = lambda: None, scratch: Path | None = None,
    ) -> int:  # fmt: skip
        """As ``run`` without waiting."""
        scratch = scratch or self.scratch

        def work() -> None:
            faults, listed = Faults(str(root) + os.sep, kind, at), scratch / "changes"
            before()
            faults.install()
            try:
                main(args)
            finally:
                faults.inside = True
                faults.kind = ""
                os.write(os.open(listed, os.O_WRONLY | os.O_TRUNC), json.dumps(faults.seen).encode())

        return start(work, scratch=scratch)

    def moments(self, count: int, label: str, most: int = MOMENTS) -> list[int]:
        """Seeded random numbers of changes, from 1 to ``count``: each once before any comes twice."""
        rng, found = random.Random(f"{SEED}/{label}"), list[int]()
        while len(found) < most:
            found += rng.sample(range(1, count + 1), min(count, most - len(found)))
        return found


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Models, pictures with captions, and a place for what children say."""
    world = tmp_path_factory.mktemp("world")
    for seed, name in enumerate("ab"):
        write_export(tiny_clip(seed), world / name)
    generator = torch.Generator().manual_seed(0)
    (world / "pictures").mkdir()
    rows = ["image,caption"]
    for i in range(12):
        pixels = torch.randint(0, 256, (40, 40, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(world / "pictures" / f"{i:02}.png")
        rows.append(f"pictures/{i:02}.png,a picture of thing{i}")
    (world / "pairs.csv").write_text("\n".join(rows) + "\n")
    torch.set_num_threads(1)
    import clipgraft.evaluation.zero_shot
    import clipgraft.execution
    import clipgraft.trainer  # noqa: F401 - imported once, here, instead of in every child
    from clipgraft.registry import current

    current()
    return Bench(world, tmp_path_factory.mktemp("scratch"))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """An empty folder; big things in it go when the test ends."""
    folder = tmp_path / "place"
    folder.mkdir()
    yield folder
    with suppress(OSError):
        shutil.rmtree(folder)


def torn(root: Path) -> list[str]:
    """What lies below ``root`` under a final name and isn't whole; names that begin with a dot are temporary."""
    problems = []
    for file in sorted(root.rglob("*")):
        if any(part.startswith(".") for part in file.relative_to(root).parts) or not file.is_file():
            continue
        try:
            if file.suffix == ".safetensors":
                files.check_tensors(file)
            elif file.suffix == ".json":
                json.loads(file.read_text("utf-8"))
            elif file.suffix == ".jsonl":
                for line in file.read_text("utf-8").splitlines()[:-1]:
                    json.loads(line)
            elif file.suffix == ".parquet":
                from pyarrow import parquet

                parquet.read_table(file)
            elif file.suffix in (".yaml", ".md", ".csv", ".html") and not file.read_bytes():
                raise ValueError("empty")
            if file.name == files.MANIFEST:
                files.verify(file.parent)
            if file.name == "clipgraft.json":
                for name, entry in json.loads(file.read_text("utf-8"))["files"].items():
                    if files.sha256_of(file.parent / name) != entry["sha256"]:
                        raise ValueError(f"{name} is another")
        except (ValueError, OSError, ClipgraftError) as error:
            problems.append(f"{file.relative_to(root)}: {error}")
    return problems


def litter(root: Path) -> list[str]:
    """Temporary names below ``root``."""
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.name.startswith(".") or p.suffix == ".tmp")


def content(root: Path) -> dict[str, bytes]:
    """Every file below ``root``."""
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(scope="session")
def disk() -> Any:
    """``torn``, ``litter`` and ``content``, for test files, which can't import this one."""
    from types import SimpleNamespace

    return SimpleNamespace(torn=torn, litter=litter, content=content, start=start, finish=finish)
