"""``clipgraft report``: the HTML report of a run, or a comparison of two."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="A run directory.", metavar="RUN")],
    other: Annotated[
        Path | None, typer.Argument(help="A second run, which is compared with the first.", metavar="[RUN2]")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="HTML file to write [default: RUN/report.html, with two runs RUN2/against-RUN.html]."),
    ] = None,
) -> None:
    """Write the HTML report of a run, or compare two, e.g. clipgraft report runs/a runs/b"""
    from clipgraft.log import RunLog

    log = RunLog()
    with redirect_stdout(sys.stderr):  # whatever libraries print
        if other is None:
            from clipgraft_evaluation.report import write_report

            path = write_report(run, out, log=log)
        else:
            from clipgraft_evaluation.two_runs import write_comparison

            path = write_comparison(run, other, out, log=log)
    print(path)
