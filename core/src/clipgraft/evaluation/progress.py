"""Progress that stays silent as long as nobody has to wait."""

from __future__ import annotations

from contextlib import ExitStack
from threading import Lock, Timer
from types import TracebackType
from typing import Self

from rich.errors import LiveError

from clipgraft.log import Bar, RunLog

PATIENCE = 2.0
"""Seconds after which a bar appears."""


class LateBar:
    """A bar of ``log`` that appears when its block takes longer than ``PATIENCE``; nothing without a log."""

    def __init__(self, log: RunLog | None, title: str, total: int) -> None:
        self.log, self.title, self.total, self.done = log, title, total, 0
        self._bar: Bar | None = None
        self._open, self._lock = ExitStack(), Lock()
        self._timer = Timer(PATIENCE, self._show)
        self._timer.daemon = True

    def advance(self, steps: int) -> None:
        """Move on."""
        with self._lock:
            self.done += steps
            if self._bar is not None:
                self._bar.advance(steps)

    def _show(self) -> None:
        with self._lock:
            if self.log is not None and self.done < self.total:
                try:
                    self._bar = self._open.enter_context(self.log.progress(self.title, self.total, done=self.done))
                except LiveError:  # older versions of rich show one bar at a time, and another one is running
                    self._bar = None

    def __enter__(self) -> Self:
        if self.log is not None and self.total:
            self._timer.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._timer.cancel()
        with self._lock:
            self.log = None
            self._open.close()
