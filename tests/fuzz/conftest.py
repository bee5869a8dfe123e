"""The arena of the fuzz tests: a call in it may succeed or refuse in one line; nothing else is allowed to happen.

While a call runs, an audit hook watches what Python opens for writing, starts, imports and unpickles; afterwards the
folders around the output folder must be as they were. Time is bounded in CPU seconds (busy) and in seconds (waiting),
memory by an address space limit.

``CLIPGRAFT_FUZZ=thorough`` (``nox -s fuzz``) tries thousands of cases instead of a few per test.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

THOROUGH = os.environ.get("CLIPGRAFT_FUZZ") == "thorough"
for name, brief, thorough in (("fuzz-many", 50, 6000), ("fuzz-some", 15, 1500), ("fuzz-few", 8, 300)):
    settings.register_profile(
        name,
        max_examples=thorough if THOROUGH else brief,
        derandomize=not THOROUGH,  # the everyday session is the same every day
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )

BUSY, WAITING, MEMORY = 20, 120, 3 * 2**30
"""Seconds of CPU, seconds, and bytes on top of what is there, for one call."""
CANARY = "clipgraft_canary"
"""A module that nobody may import: configs and manifests of models name it."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {
    "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "shutil.move",
    "shutil.rmtree", "shutil.copyfile", "shutil.unpack_archive",
}  # fmt: skip
FORBIDDEN = {
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pickle.find_class", "socket.connect",
    "pty.spawn", "webbrowser.open",
}  # fmt: skip


LOOKING = {"fc-list", "ldconfig", "uname"}
"""Programs with which libraries look around on the machine when they are imported."""


class Hang(BaseException):
    """A call took too long."""


@dataclass
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str


@dataclass
class Arena:
    """``work`` holds inputs, ``out`` alone may be written, ``canary`` is there only if code of an input ran."""

    base: Path
    happened: list[str] = field(default_factory=list)
    active: bool = False

    def __post_init__(self) -> None:
        self.work, self.out, self.home = (self.base / name for name in ("work", "out", "home"))
        self.scratch, self.canary = self.base / "scratch", self.base / "canary"
        for folder in (self.work, self.out, self.home, self.scratch, self.base / "beside"):
            folder.mkdir()
        (self.base / "beside" / "precious.txt").write_text("kept", "utf-8")
        (self.base / "modules").mkdir()
        (self.base / "modules" / f"{CANARY}.py").write_text(f"open({str(self.canary)!r}, 'w').close()\n", "utf-8")
        sys.addaudithook(self._audit)

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event in FORBIDDEN and not (event == "subprocess.Popen" and os.path.basename(str(args[0])) in LOOKING):
            self.happened.append(f"{event} {args!r:.200}")
        elif event == "import" and args[0] == CANARY:
            self.happened.append("imported the canary")
        elif event == "open" and not isinstance(args[0], int) and isinstance(args[2], int) and args[2] & WRITING:
            self._may_write(event, args[0])
        elif event in CHANGES:
            copies = event in ("os.link", "os.symlink", "shutil.copyfile")
            for path in args[1:2] if copies else args[:2] if event in ("os.rename", "shutil.move") else args[:1]:
                self._may_write(event, path, folder=args[-1] if event in ("os.mkdir", "os.remove", "os.rmdir") else -1)

    def _may_write(self, event: str, path: Any, *, folder: int = -1) -> None:
        if isinstance(path, int):
            return
        here = os.readlink(f"/proc/self/fd/{folder}") if folder >= 0 else os.getcwd()
        place = os.path.normpath(os.path.join(here, os.fsdecode(path)))
        free = (str(self.out), str(self.scratch), "/dev/")
        if not place.startswith(free) and "__pycache__" not in place and not place.endswith(".pyc"):
            self.happened.append(f"{event} {place}")

    def snapshot(self) -> dict[str, tuple[int, int]]:
        """Everything around the output folder: {path: (size, time)}."""
        found = {}
        for folder, folders, names in os.walk(self.base):
            if Path(folder) in (self.out, self.scratch):
                folders.clear()
                continue
            for name in names:
                stat = os.lstat(os.path.join(folder, name))
                found[os.path.join(folder, name)] = stat.st_size, stat.st_mtime_ns
            found[folder] = 0, 0
        return found

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Run the block under every watch."""
        before, here, temporary = self.snapshot(), os.getcwd(), tempfile.tempdir
        places = {"HOME": self.home, **dict.fromkeys(("TMPDIR", "MPLCONFIGDIR", "XDG_CACHE_HOME"), self.scratch)}
        home = {key: os.environ.get(key) for key in places}
        os.environ |= {key: str(place) for key, place in places.items()}
        tempfile.tempdir = str(self.scratch)
        sys.path.insert(0, str(self.base / "modules"))
        os.chdir(self.work)
        self.happened.clear()
        with _bounded():
            self.active = True
            try:
                yield
            finally:
                self.active = False
                os.chdir(here)
                sys.path.remove(str(self.base / "modules"))
                tempfile.tempdir = temporary
                for key, value in home.items():
                    os.environ.pop(key) if value is None else os.environ.update({key: value})
        assert not self.happened, f"not allowed: {self.happened}"
        assert not self.canary.exists(), "code of an input ran"
        after = self.snapshot()
        changed = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
        assert not changed, f"written outside of the output folder: {changed}"

    def call(self, function: Callable[[], Any], *, refusals: tuple[type[Exception], ...] = ()) -> tuple[Any, str]:
        """The value and "", or None and the one line with which it was refused. Anything else fails the test."""
        from clipgraft.errors import ClipgraftError

        with self.guarded():
            try:
                return function(), ""
            except (ClipgraftError, *refusals) as error:
                said = str(error)
        assert said.strip(), "an empty refusal"
        assert len(said) < 9000, f"a refusal of {len(said)} letters: {said[:300]}"
        return None, said

    def command(self, *words: str, allowed: tuple[int, ...] = (0, 1, 2)) -> Outcome:
        """``clipgraft WORDS`` in this process; a failure is one line that doesn't ask for --debug."""
        from clipgraft.cli import main

        out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors=e) for e in ("strict", "backslashreplace"))
        code: Any = 0
        with self.guarded(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main(list(words))
            except SystemExit as stop:
                code = stop.code
        out.flush(), err.flush()
        found = Outcome(code, out.buffer.getvalue().decode(), err.buffer.getvalue().decode())
        shown = f"clipgraft {' '.join(words)!r:.500} -> {code}\n{found.out[-1000:]}\n{found.err[-3000:]}"
        assert code in allowed, shown
        assert "Traceback" not in found.err + ("" if "doctor" in words else found.out), shown  # which shows a plugin's
        assert "run again with --debug" not in found.err, shown
        if code and "--help" not in words:
            last = found.err.strip().splitlines()[-1:]
            helped = "Usage:" in found.out + found.err  # a group without a command prints its help
            assert helped or "doctor" in words or (last and last[0].startswith("error: ") and len(last[0]) < 9000), (
                shown
            )
        return found


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Limits on time and memory; only what the main thread does in Python can be interrupted."""

    def late(number: int, _frame: Any) -> None:
        raise Hang(f"{BUSY} s of work" if number == signal.SIGPROF else f"{WAITING} s of waiting")

    old = {number: signal.signal(number, late) for number in (signal.SIGPROF, signal.SIGALRM)}
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    statm = Path("/proc/self/statm")
    if statm.exists():
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    signal.setitimer(signal.ITIMER_PROF, BUSY)
    signal.setitimer(signal.ITIMER_REAL, WAITING)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        for number, handler in old.items():
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Arena:
    """One for the whole session: an audit hook can't be removed."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for module in ("accelerate", "open_clip"):
        importlib.import_module(module)  # takes seconds
    return Arena(tmp_path_factory.mktemp("arena").resolve())
