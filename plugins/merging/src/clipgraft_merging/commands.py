"""`clipgraft merging`: every command in a module of its own, which imports what is heavy when it is called."""

from __future__ import annotations

import typer

app = typer.Typer(no_args_is_help=True, help="Merge CLIPs, and graft other models' abilities onto one.")


@app.callback()
def merging() -> None:
    """Merge CLIPs, and graft other models' abilities onto one."""
