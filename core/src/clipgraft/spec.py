"""What a plugin manifest may import: records of strings and the hook markers. Standard library and pluggy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import pluggy

API_GROUP = "clipgraft.v1"
"""Entry-point group of this API major; a plugin built for another major lives in another group."""

Kind = Literal["encoder", "graft", "head", "loss", "dataset", "evaluator", "suite", "recipe", "run-hook", "claim",
               "exporter", "report"]  # fmt: skip
KINDS: tuple[Kind, ...] = get_args(Kind)

hookimpl = pluggy.HookimplMarker("clipgraft")
"""Marks a registration hook: a module-level function of a manifest."""

runhook = pluggy.HookimplMarker("clipgraft_run")
"""Marks a lifecycle hook: a method of an object that a config or recipe switches on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One thing a plugin offers, as strings, so that listing it imports nothing.

    ``target`` ("package.module:attribute") is called with the fields of ``config`` (a pydantic model,
    "package.module:Class") as keyword arguments and returns the component. A recipe's target is called with the
    whole config object; a claim's target is the ``Claim`` itself, a suite's, an exporter's and a report's the function
    itself.
    ``presets`` is the package folder ("package.folder") that holds a recipe's ``<name>-<preset>.yaml`` files.
    ``needs`` are requirement strings that must be installed, ``paper`` is "authors, title, venue, arXiv id".
    """

    name: str
    target: str
    config: str | None = None
    summary: str = ""
    needs: tuple[str, ...] = ()
    paper: str = ""
    presets: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandSpec:
    """A command group: ``target`` names a ``typer.Typer`` app or a function, imported on invocation only."""

    name: str
    target: str
    help: str
