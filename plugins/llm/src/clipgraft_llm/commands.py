"""`clipgraft llm`: every command in a module of its own, which imports what is heavy when it is called."""

from __future__ import annotations

import typer

from clipgraft_llm import command_cache

app = typer.Typer(no_args_is_help=True, help="Other text towers, longer texts, sharper words.")


@app.callback()
def llm() -> None:
    """Other text towers, longer texts, sharper words."""


app.command("cache")(command_cache.cache)
