"""``clipgraft plugins``, ``clipgraft list`` and ``clipgraft show``: what is installed and what it offers."""

from __future__ import annotations

from typing import Annotated

import typer

from clipgraft.cli.output import JsonFlag, emit, table
from clipgraft.errors import unknown_name
from clipgraft.manifests import PLURALS
from clipgraft.registry import current

app = typer.Typer(name="plugins", no_args_is_help=True, help="List, show and diagnose plugins.")


def list_components(
    what: Annotated[str, typer.Argument(help=f"One of {', '.join(PLURALS)}.", metavar="WHAT")],
    json: JsonFlag = False,
) -> None:
    """List everything of one kind."""
    if what not in PLURALS:
        raise unknown_name("kind", what, PLURALS)
    rows = [
        {"name": r.name, "summary": r.component.summary, "plugin": r.plugin, "paper": r.component.paper}
        for r in current().list(PLURALS[what])
    ]
    emit(rows) if json else table(rows, ["name", "summary"])


@app.command("list")
def list_plugins(json: JsonFlag = False) -> None:
    """Every plugin with its status."""
    rows = [
        {
            "name": i.name,
            "distribution": i.distribution,
            "version": i.version,
            "status": i.status,
            "components": i.components,
            "load_ms": i.load_ms,
            "error": i.error,
            "path": i.path,
        }
        for i in current().plugins
    ]
    emit(rows) if json else table(rows, ["name", "distribution", "version", "status", "load_ms", "error"])
