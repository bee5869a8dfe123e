"""`clipgraft data`: what is wrong with a data set, before a run finds out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipgraft.cli.output import JsonFlag, emit

if TYPE_CHECKING:
    from clipgraft_data.check import Report

app = typer.Typer(no_args_is_help=True, help="Look for what is wrong with a data set.")


@app.callback()
def data() -> None:
    """Look for what is wrong with a data set."""


@app.command()
def check(
    source: Annotated[str, typer.Argument(metavar="SRC", help="folder:DIR, csv:FILE, wds:DIR or any data reference.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report as JSON.")] = None,
    quarantine: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the ids to leave out, for data.exclude.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read.")] = 0,
    near: Annotated[
        int, typer.Option(min=-1, max=12, help="Bits of 64 in which near duplicates differ at most; -1 for none.")
    ] = 4,
    min_side: Annotated[int, typer.Option(min=1, help="Shortest side of an image that isn't tiny [pixels].")] = 32,
    max_pixels: Annotated[int, typer.Option(min=1, help="More are a decompression bomb [pixels].")] = 100_000_000,
    repeated: Annotated[int, typer.Option(min=2, help="Images from which one caption is repeated too often.")] = 10,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Whose context captions must fit; 77 words without it.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 when anything was found.")] = False,
    json: JsonFlag = False,
) -> None:
    """Read every sample and report what is wrong, e.g. clipgraft data check folder:photos --quarantine out.tsv"""
    import sys
    from contextlib import redirect_stdout

    from clipgraft import files
    from clipgraft.data import open_source
    from clipgraft.errors import InputError
    from clipgraft.registry import current
    from clipgraft_data.check import check as look
    from clipgraft_data.inspection import longer_than_context

    with redirect_stdout(sys.stderr):  # whatever libraries print
        opened = open_source(source, registry=current(), max_pixels=max_pixels)
        if hasattr(opened, "patterns"):
            raise InputError(f"{source} holds minimal pairs; this looks at single images with captions or labels")
        full = None
        if model is not None:
            from clipgraft.encoders import load

            tokenizer = load(model, registry=current()).tokenizer
            full = longer_than_context(tokenizer, tokenizer.pad_id)
        report = look(
            opened,
            near=near,
            min_side=min_side,
            repeated=repeated,
            workers=0 if full else workers,  # tokenizers don't travel to other processes
            max_pixels=max_pixels,
            full=full,
        )
        if out is not None:
            files.write_json(out, report.as_dict())
        if quarantine is not None:
            _write_list(quarantine, report.quarantine())
    if json:
        emit(report.as_dict())
    else:
        _show(report)
    if strict and report.found:
        raise typer.Exit(1)


def _write_list(path: Path, listed: dict[str, str]) -> None:
    """One id per line, the reason after a tab."""
    import sys

    from clipgraft import files

    plain = {name: reason for name, reason in listed.items() if not {"\t", "\n", "\r"} & set(name)}
    files.write_text(path, "".join(f"{name}\t{' '.join(reason.split())}\n" for name, reason in plain.items()))
    if len(plain) < len(listed):
        print(f"{len(listed) - len(plain)} ids with tabs or line breaks can't be listed; rename them", file=sys.stderr)


def _show(report: Report) -> None:
    """A table of counts with the first ten of each kind, and the classes."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from clipgraft_data.check import KINDS

    console = Console(highlight=False)
    table = Table("what", "count", "first ten", title=escape(f"{report.source}: {report.samples} samples"))
    for kind, found in report.found.items():
        examples = "\n".join(escape(f"{name}: {reason}") for name, reason in found[:10])
        table.add_row(f"{kind}\n[dim]{KINDS[kind]}", str(len(found)), examples)
    if report.found:
        console.print(table)
    else:
        console.print(escape(f"{report.source}: {report.samples} samples, nothing found"))
    if report.classes:
        counts = sorted(report.classes.values())
        told = (
            f"{len(counts)} classes with {counts[0]} to {counts[-1]} samples, {counts[len(counts) // 2]} in the middle"
        )
        console.print(told)
