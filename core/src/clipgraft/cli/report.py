"""``clipgraft report``: the HTML report of a run, written by the evaluation plugin."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer

from clipgraft.errors import InputError
from clipgraft.registry import current


def engine(module: str) -> Any:
    """A module of clipgraft-evaluation, or None when that plugin isn't in use."""
    # By name, and only while the registry calls the plugin fine: the core imports no plugin, and a report is nothing
    # that a config could name, so it needs no component kind.
    if any(plugin.distribution == "clipgraft-evaluation" and plugin.status == "ok" for plugin in current().plugins):
        return importlib.import_module(f"clipgraft_evaluation.{module}")
    return None


def report(
    run: Annotated[Path, typer.Argument(help="A run directory.", metavar="RUN")],
    out: Annotated[Path | None, typer.Option(help="HTML file to write [default: RUN/report.html].")] = None,
) -> None:
    """Write the HTML report of a run."""
    writer = engine("report")
    if writer is None:
        raise InputError("the plugin evaluation writes reports and is not in use: pip install clipgraft-evaluation")
    print(writer.write_report(run, out))
