"""Which detector the run at work has made so far, for evaluators, which are given an encoder and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from clipgraft.spec import runhook
from clipgraft_anomaly.detector import DetectorHead

if TYPE_CHECKING:
    from clipgraft.runner import Run
    from clipgraft.stage import StageResult

_head: ContextVar[DetectorHead | None] = ContextVar("head", default=None)


def current_head() -> DetectorHead | None:
    """The head of the run at work; None outside of runs and before one made any."""
    return _head.get()


@contextmanager
def use_head(head: DetectorHead | None) -> Iterator[None]:
    """Make ``head`` the current one for a while."""
    token = _head.set(head)
    try:
        yield
    finally:
        _head.reset(token)


class RunsDetector:
    """Lifecycle hook: the head that a stage left is the current one from then on, also when the run is resumed.

    A recipe that makes detectors switches it on in its ``check``, by ``switch_on(run)``.
    """

    @runhook
    def on_run_start(self, run: Run) -> None:
        """Take up what stages left that ended in an earlier process."""
        _head.set(None)
        for folder in sorted((run.path / "stages").glob("[0-9][0-9]-*")):
            name = folder.name[3:]
            if run.finished(name):
                self._take(run.left_by(name))

    @runhook
    def on_stage_end(self, result: StageResult) -> None:
        """Take up what the stage left."""
        self._take(result)

    @runhook
    def on_run_end(self, run: Run) -> None:
        """The next run starts without."""
        _head.set(None)

    def _take(self, result: StageResult) -> None:
        for module in result.components.values():
            if isinstance(module, DetectorHead):
                _head.set(module)


NAME = "the recipe's detector"


def switch_on(run: Run) -> None:
    """Let the evaluators of ``run`` see the detector that it makes; once is enough, twice is no error."""
    if NAME not in run.hooks.names("on_run_start"):
        run.hooks.register(RunsDetector(), NAME)
