"""Lifecycle hooks: objects whose ``@runhook`` methods a run calls; only those that a recipe or config names are on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pluggy

from clipgraft.errors import PluginError
from clipgraft.manifests import HookManager, one_line

if TYPE_CHECKING:
    from clipgraft.runner import Run
    from clipgraft.stage import Stage, StageResult
    from clipgraft.types import Batch, StepOutput

hookspec = pluggy.HookspecMarker("clipgraft_run")


class Lifecycle:
    """What a hook object may implement, with any subset of the arguments."""

    @hookspec
    def on_run_start(self, run: Run) -> None:
        """The run directory exists; nothing was measured or trained."""

    @hookspec
    def on_run_end(self, run: Run) -> None:
        """The run is over, also after an error."""

    @hookspec
    def on_stage_start(self, run: Run, stage: Stage) -> None:
        """The stage is built and about to run."""

    @hookspec
    def on_stage_end(self, run: Run, stage: Stage, result: StageResult) -> None:
        """What the stage left is on disk."""

    @hookspec
    def before_step(self, run: Run, stage: Stage, step: int, batch: Batch) -> None:
        """Observe the batch on its device; never replace it."""

    @hookspec
    def before_optimizer(self, run: Run, stage: Stage, step: int) -> None:
        """Gradients are final and unscaled, not yet clipped."""

    @hookspec
    def after_step(self, run: Run, stage: Stage, step: int, output: StepOutput) -> None:
        """The step is done; ``output`` is detached and still on its device."""

    @hookspec
    def on_evaluate(self, run: Run, stage: Stage, step: int) -> dict[str, float]:  # type: ignore[empty-body]
        """More metrics; two hooks that report one name are an error."""

    @hookspec
    def on_save(self, run: Run, stage: Stage) -> dict[str, Any]:  # type: ignore[empty-body]
        """This hook's own entry in the resume state: tensors and plain JSON types."""

    @hookspec
    def on_load(self, run: Run, stage: Stage, state: dict[str, Any]) -> None:
        """The entry that ``on_save`` returned."""

    @hookspec
    def on_error(self, run: Run, error: BaseException) -> None:
        """Report ``error``; it can't be swallowed, and a failure in here doesn't replace it."""


class RunHooks:
    """The hooks of one run, in a plugin manager of its own.

    A hook that raises fails the run, unless it has ``observer = True`` (a logger): that is reported once and muted.
    """

    def __init__(self, *, report: Callable[[str], None] | None = None) -> None:
        self._manager = HookManager("clipgraft_run", Lifecycle, ("on_", "before_", "after_"))
        self._muted: set[str] = set()
        self._report = report or (lambda line: print(f"clipgraft: {line}", file=sys.stderr))

    def register(self, hook: object, name: str) -> None:
        """Switch ``hook`` on under ``name``; a name used twice and an unknown hook method are errors."""
        if self._manager.has_plugin(name):
            raise PluginError(f"lifecycle hook {name!r} is switched on twice; name it once")
        try:
            self._manager.add(hook, name)
        except Exception as error:
            raise PluginError(f"lifecycle hook {name!r}: {one_line(error)}") from error

    def names(self, hook: str) -> list[str]:
        """Who implements ``hook``, in call order."""
        return [impl.plugin_name for impl in self._impls(hook)]

    def call(self, hook: str, **arguments: Any) -> list[Any]:
        """Call every implementation; returns what isn't None."""
        found = [self._call(impl, hook, arguments) for impl in self._impls(hook)]
        return [value for value in found if value is not None]

    def call_one(self, name: str, hook: str, **arguments: Any) -> Any:
        """Call the implementation of the hook object registered as ``name``."""
        return next(self._call(impl, hook, arguments) for impl in self._impls(hook) if impl.plugin_name == name)

    def _impls(self, hook: str) -> list[Any]:
        """Implementations in pluggy's order: ``tryfirst`` ones, then the last registered first."""
        return [*reversed(getattr(self._manager.hook, hook).get_hookimpls())]

    def _call(self, impl: Any, hook: str, arguments: dict[str, Any]) -> Any:
        name = impl.plugin_name
        if name in self._muted:
            return None
        try:
            return impl.function(*(arguments[a] for a in impl.argnames))
        except Exception as error:
            if hook != "on_error" and not getattr(impl.plugin, "observer", False):
                raise
            self._muted.add(name)
            self._report(f"hook {name} failed in {hook} and is switched off: {one_line(error)}")
            return None
