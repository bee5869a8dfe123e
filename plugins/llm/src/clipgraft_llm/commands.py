"""`clipgraft llm`: every command in a module of its own, which imports what is heavy when it is called."""

from __future__ import annotations

import typer

from clipgraft_llm import command_cache, command_import_long_clip, command_negatives, command_reinforce

app = typer.Typer(no_args_is_help=True, help="Other text towers, longer texts, sharper words.")


@app.callback()
def llm() -> None:
    """Other text towers, longer texts, sharper words."""


app.command("cache")(command_cache.cache)
app.command("negatives")(command_negatives.negatives)
app.command("reinforce-data")(command_reinforce.reinforce_data)
app.command("import-long-clip")(command_import_long_clip.import_long_clip)
