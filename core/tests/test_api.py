"""The Python API: few names, lazy, and ``clipgraft.run`` that runs a recipe."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

import clipgraft
from clipgraft.registry import Registry, use


def test_the_api_is_short_and_every_name_resolves() -> None:
    assert len(clipgraft.__all__) <= 25 and len(set(clipgraft.__all__)) == len(clipgraft.__all__)
    for name in clipgraft.__all__:
        assert getattr(clipgraft, name) is not None
    assert set(clipgraft._SOURCES) == set(clipgraft.__all__) - {"__version__", "plugins"}
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        clipgraft.absent  # type: ignore[attr-defined]  # noqa: B018


def test_type_checkers_see_the_same_names() -> None:
    (block,) = [
        node for node in ast.parse(Path(clipgraft.__file__).read_text("utf-8")).body if isinstance(node, ast.If)
    ]
    seen = {
        (a.asname or a.name): node.module for node in block.body if isinstance(node, ast.ImportFrom) for a in node.names
    }
    assert {name: seen[name] for name in clipgraft._SOURCES} == clipgraft._SOURCES


def test_run_is_the_function_that_runs_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipgraft.execution.run_recipe", lambda recipe, **settings: (recipe, settings))
    run: Any = clipgraft.run
    assert run("core/finetune", seed=3) == ("core/finetune", {"seed": 3})


def test_plugins_are_those_of_the_current_registry() -> None:
    with use(Registry.discover(allow=[])) as registry:
        assert clipgraft.plugins() is registry.plugins
