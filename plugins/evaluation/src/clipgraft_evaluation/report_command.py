"""``clipgraft report``: the HTML report of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="A run directory.", metavar="RUN")],
    out: Annotated[Path | None, typer.Option(help="HTML file to write [default: RUN/report.html].")] = None,
) -> None:
    """Write the HTML report of a run."""
    from clipgraft_evaluation.report import write_report

    print(write_report(run, out))
