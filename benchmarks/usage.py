"""What a process used: CPU seconds, and memory by Linux's account of it."""

from __future__ import annotations

import resource
import threading
from pathlib import Path


def cpu_seconds() -> float:
    """Of this process and of its children that ended: workers, compilers."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def resident(name: str) -> float:
    """A line of the account, such as RssAnon, VmRSS or VmHWM, in MB of a million bytes."""
    text = Path("/proc/self/status").read_text("utf-8")
    return int(text.split(f"{name}:")[1].split()[0]) * 1024 / 1e6


class Peak:
    """The largest RssAnon while the block runs, and the one at its start, in MB."""

    def __enter__(self) -> Peak:
        self.start = self.value = resident("RssAnon")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._stop.wait(0.001):
            self.value = max(self.value, resident("RssAnon"))

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.value = max(self.value, resident("RssAnon"))
