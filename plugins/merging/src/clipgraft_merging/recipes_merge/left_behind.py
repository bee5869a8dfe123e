"""What a run measured of models that it does not export, for evaluators: they are given one encoder and nothing else.

A stage writes it as ``measured.json`` into its folder; ``MeasuredAside`` shows the run's to its evaluators.
"""

from __future__ import annotations

import json
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from clipgraft.spec import runhook

if TYPE_CHECKING:
    from clipgraft.runner import Run

FILE, NAME = "measured.json", "the merge's measurements"

_measured: ContextVar[dict[str, Any] | None] = ContextVar("measured", default=None)


def measured() -> dict[str, Any] | None:
    """What the run at work has measured beside its encoder; None before, and outside of runs."""
    return _measured.get()


class MeasuredAside:
    """Lifecycle hook that reads ``measured.json`` of any stage, also of one that ended in an earlier process."""

    @runhook
    def on_run_start(self, run: Run) -> None:
        """Take up what is there."""
        _measured.set(None)
        self._take(run)

    @runhook
    def on_stage_end(self, run: Run) -> None:
        """Take up what the stage left."""
        self._take(run)

    @runhook
    def on_run_end(self, run: Run) -> None:
        """The next run starts without."""
        _measured.set(None)

    def _take(self, run: Run) -> None:
        for file in sorted((run.path / "stages").glob(f"*/{FILE}")):
            if run.finished(file.parent.name[3:]):
                _measured.set(json.loads(file.read_text("utf-8")))


def switch_on(run: Run) -> None:
    """Once is enough, twice is no error."""
    if NAME not in run.hooks.names("on_run_start"):
        run.hooks.register(MeasuredAside(), NAME)
