"""Lifecycle hooks: a manager per run, arguments by name, observers that can't fail a run."""

from __future__ import annotations

from typing import Any

import pytest

from clipgraft.errors import PluginError
from clipgraft.runhooks import Lifecycle, RunHooks
from clipgraft.spec import runhook


class Counter:
    """Counts steps and keeps its count through a resume."""

    def __init__(self) -> None:
        self.steps = 0

    @property
    def on_fire(self) -> None:
        raise AssertionError("looking at a hook object must not evaluate its properties")

    @runhook
    def after_step(self, step: int) -> None:
        self.steps = step

    @runhook
    def on_evaluate(self, stage: str) -> dict[str, float]:
        return {f"{stage}.steps": float(self.steps)}

    @runhook
    def on_save(self) -> dict[str, Any]:
        return {"steps": self.steps}

    @runhook
    def on_load(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


class Failing:
    def __init__(self, *, observer: bool) -> None:
        self.observer, self.calls = observer, 0

    @runhook
    def before_step(self, batch: object) -> None:
        self.calls += 1
        raise ValueError("no disk")

    @runhook
    def on_error(self, error: BaseException) -> None:
        raise RuntimeError("reporting failed too")


STEP: dict[str, Any] = {"run": "r", "stage": "s", "step": 3}


def test_hooks_get_the_arguments_they_name_and_keep_state() -> None:
    hooks, counter, restored = RunHooks(), Counter(), Counter()
    hooks.register(counter, "toy/counter")
    hooks.register(restored, "toy/restored")
    assert hooks.call("after_step", **STEP, output=None) == []
    assert hooks.call("on_evaluate", **STEP) == [{"s.steps": 3.0}] * 2
    assert hooks.names("on_save") == ["toy/restored", "toy/counter"]  # pluggy's order: last registered first
    counter.steps = 9
    state = hooks.call_one("toy/counter", "on_save", run="r", stage="s")
    hooks.call_one("toy/restored", "on_load", run="r", stage="s", state=state)
    assert restored.steps == 9
    assert hooks.call("on_run_start", run="r") == []


def test_runs_do_not_share_hooks() -> None:
    first = RunHooks()
    first.register(Counter(), "c")
    assert RunHooks().names("after_step") == [] and first.names("after_step") == ["c"]


def test_a_failing_hook_fails_the_run_but_an_observer_is_reported_once_and_muted() -> None:
    hooks, told = RunHooks(), list[str]()
    hooks.register(Failing(observer=False), "strict")
    with pytest.raises(ValueError, match="no disk"):
        hooks.call("before_step", **STEP, batch=1)
    watched, failing = RunHooks(report=told.append), Failing(observer=True)
    watched.register(failing, "logger")
    watched.register(counter := Counter(), "counter")
    for _ in range(2):
        watched.call("before_step", **STEP, batch=1)
        watched.call("after_step", **STEP, output=None)
    assert failing.calls == 1 and counter.steps == 3
    assert told == ["hook logger failed in before_step and is switched off: ValueError: no disk"]


def test_reporting_an_error_never_replaces_it() -> None:
    told: list[str] = []
    hooks = RunHooks(report=told.append)
    hooks.register(Failing(observer=False), "strict")
    assert hooks.call("on_error", run="r", error=ValueError()) == [] and "reporting failed too" in told[0]


def test_mistakes_show_when_the_hook_is_switched_on() -> None:
    class Typo:
        @runhook
        def before_stp(self) -> None: ...

    class Unknown:
        @runhook
        def before_step(self, bacth: object) -> None: ...

    class Default:
        @runhook
        def before_step(self, batch: object = None) -> None: ...

    hooks = RunHooks()
    for hook, message in ((Typo(), "did you mean before_step"), (Unknown(), "bacth"), (Default(), "default arguments")):
        with pytest.raises(PluginError, match=message):
            hooks.register(hook, "toy/x")
    hooks.register(Counter(), "toy/x")  # none of the three was left behind
    with pytest.raises(PluginError, match="switched on twice"):
        hooks.register(Counter(), "toy/x")


def test_every_lifecycle_hook_says_what_it_is() -> None:
    specs = [value for name, value in vars(Lifecycle).items() if not name.startswith("_")]
    assert len(specs) == 11 and all(spec.__doc__ for spec in specs)
