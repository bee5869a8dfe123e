"""What a run says: text to stderr and log.txt, metrics as JSON lines, progress for people."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from clipgraft import files


class Bar:
    """One running step: ``advance`` moves it, ``note`` shows a short text beside it."""

    def __init__(self, log: RunLog, title: str, total: int, done: int) -> None:
        self.log, self.title, self.total, self.done = log, title, total, done
        self.text, self._told = "", time.monotonic()
        self._progress: Progress | None = None
        if log.is_main and log.console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=log.console,
            )
            self._progress.start()
            self._task = self._progress.add_task(title, total=total, completed=done, note="")

    def advance(self, steps: int = 1, *, note: str | None = None) -> None:
        """Move on; without a terminal a plain line appears every 10 seconds and at the end."""
        self.done += steps
        self.text = self.text if note is None else note
        if self._progress is not None:
            self._progress.update(self._task, completed=self.done, note=self.text)
        elif time.monotonic() - self._told > 10 or self.done == self.total:
            self._told = time.monotonic()
            self.log.info(f"{self.title} {self.done}/{self.total} {self.text}".rstrip())

    def stop(self) -> None:
        """Leave the terminal as it was."""
        if self._progress is not None:
            self._progress.stop()


class RunLog:
    """Messages of a run. Only the main rank writes."""

    def __init__(self, path: Path | None = None, *, is_main: bool = True, stream: TextIO | None = None) -> None:
        self.path, self.is_main = path, is_main
        self.console = Console(file=stream or sys.stderr, highlight=False)

    def info(self, message: str) -> None:
        """One line on stderr and in log.txt."""
        if self.is_main:
            self.console.print(message, markup=False, soft_wrap=True)
            if self.path is not None:
                with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                    file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {message}\n")

    @contextmanager
    def progress(self, title: str, total: int, *, done: int = 0) -> Iterator[Bar]:
        """A bar in a terminal, plain lines otherwise."""
        bar = Bar(self, title, total, done)
        try:
            yield bar
        finally:
            bar.stop()


class MetricsFile:
    """Lines of one stage by step; reopening the file after a resume drops those of steps that are done again."""

    def __init__(self, path: Path, *, is_main: bool, after_step: int = 0) -> None:
        self.path, self.is_main = path, is_main
        if is_main and path.exists():
            lines = [line for line in path.read_text("utf-8").splitlines() if _step_of(line) <= after_step]
            files.write_text(path, "".join(line + "\n" for line in lines))  # a kill must not lose what was saved

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one JSON line."""
        if self.is_main:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def _step_of(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):  # a line cut short by a kill
        return float("inf")
