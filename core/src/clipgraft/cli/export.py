"""``clipgraft export``: any model reference as a directory."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from clipgraft.cli.output import JsonFlag, emit
from clipgraft.errors import InputError
from clipgraft.registry import current


def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Registered name, open_clip:ARCH[/TAG], hf:ORG/NAME or DIR.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory to write.")],
    format: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="clipgraft; open_clip, a directory that open_clip alone can open; or a plugin's (clipgraft list "
            "exporters).",
        ),
    ] = "clipgraft",
    json: JsonFlag = False,
) -> None:
    """Write a model as a directory that clipgraft, and where possible open_clip alone, can open."""
    from clipgraft.checkpoint import write_export
    from clipgraft.encoders import load
    from clipgraft.encoders.openclip import why_not_open_clip

    with redirect_stdout(sys.stderr):  # whatever libraries print
        if format in ("clipgraft", "open_clip"):
            encoder = load(model, registry=current())
            if format == "open_clip" and (reason := why_not_open_clip(encoder)):
                raise InputError(f"open_clip can't hold {model}: {reason}; leave --format out to export for clipgraft")
            found = {"export": str(write_export(encoder, out))}
        else:
            found = current().build("exporter", format, {})(model, out, registry=current())
    emit({"model": model, **found}) if json else print(f"model: {found['export']}")
