"""`clipgraft merging`: every command in a module of its own, which imports what is heavy when it is called."""

from __future__ import annotations

import typer

from clipgraft_merging import (
    command_greedy,
    command_opcm,
    command_path,
    command_segment,
    command_soup,
    command_task_arithmetic,
    command_ties,
    command_wise_ft,
)
from clipgraft_merging.fusion import command_fuse
from clipgraft_merging.moe import command_collapse

app = typer.Typer(no_args_is_help=True, help="Merge CLIPs, and graft other models' abilities onto one.")


@app.callback()
def merging() -> None:
    """Merge CLIPs, and graft other models' abilities onto one."""


app.command("collapse")(command_collapse.collapse)
app.command("segment")(command_segment.segment)
app.command("soup")(command_soup.soup)
app.command("greedy")(command_greedy.greedy)
app.command("wise-ft")(command_wise_ft.wise_ft)
app.command("task-arithmetic")(command_task_arithmetic.task_arithmetic)
app.command("ties")(command_ties.ties)
app.command("opcm")(command_opcm.opcm)
app.command("path")(command_path.path)
app.command("fuse")(command_fuse.fuse)
