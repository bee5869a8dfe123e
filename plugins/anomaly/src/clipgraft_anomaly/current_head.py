"""Which detector (or other trained part of this plugin) belongs to a model: the run's at work, or its export's.

Evaluators are given an encoder and nothing else, so a run's own parts reach them through here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from clipgraft.spec import runhook
from clipgraft_anomaly.detector import DetectorHead

if TYPE_CHECKING:
    from torch import nn

    from clipgraft.registry import Registry
    from clipgraft.runner import Run
    from clipgraft.stage import StageResult

T = TypeVar("T", bound="nn.Module")

_parts: ContextVar[tuple[Any, ...]] = ContextVar("parts", default=())


def current_part(kind: type[T]) -> T | None:
    """The newest part of this kind of the run at work; None outside of runs and before one made any."""
    return next((part for part in reversed(_parts.get()) if isinstance(part, kind)), None)


def current_head() -> DetectorHead | None:
    """The detector's head of the run at work."""
    return current_part(DetectorHead)  # type: ignore[type-abstract]


def part_in(folder: Path, kind: type[T], *, registry: Registry) -> T | None:
    """The newest part of this kind in a run or export; None when there is none."""
    from clipgraft.checkpoint import MANIFEST, read_component, read_manifest

    folder = folder / "export" if (folder / "export" / MANIFEST).is_file() else folder
    if not (folder / MANIFEST).is_file():
        return None
    for record in reversed(read_manifest(folder)["components"]):
        if record["use"].startswith("anomaly/"):
            part = registry.build("head", record["use"], record["config"])
            if isinstance(part, kind):
                part.load_state_dict(read_component(folder, record["name"]))
                return part
    return None


@contextmanager
def use_head(head: DetectorHead | None) -> Iterator[None]:
    """Make ``head`` the current one for a while."""
    token = _parts.set(() if head is None else (head,))
    try:
        yield
    finally:
        _parts.reset(token)


class RunsDetector:
    """Lifecycle hook: what a stage left is the run's from then on, also when the run is resumed.

    A recipe that makes such parts switches it on in its ``check``, by ``switch_on(run)``.
    """

    @runhook
    def on_run_start(self, run: Run) -> None:
        """Take up what stages left that ended in an earlier process."""
        _parts.set(())
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
        _parts.set(())

    def _take(self, result: StageResult) -> None:
        _parts.set((*_parts.get(), *(m for m in result.components.values() if hasattr(m, "registered"))))


NAME = "the recipe's detector"


def switch_on(run: Run) -> None:
    """Let the evaluators of ``run`` see what it makes; once is enough, twice is no error."""
    if NAME not in run.hooks.names("on_run_start"):
        run.hooks.register(RunsDetector(), NAME)
