"""`clipgraft video`: every command in a module of its own, which imports what is heavy when it is called."""

from __future__ import annotations

import typer

from clipgraft_video import command_classify, command_eval, command_search

app = typer.Typer(no_args_is_help=True, help="Videos with a CLIP.")


@app.callback()
def video() -> None:
    """Videos with a CLIP."""


app.command("classify")(command_classify.classify)
app.command("eval")(command_eval.evaluate)
app.command("search")(command_search.search)
