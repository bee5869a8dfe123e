"""``clipgraft demo``: one short post-training run on the toy world, from the first measurement to the report."""

from __future__ import annotations

import json as json_format
import time
from pathlib import Path
from typing import Annotated

import typer

from clipgraft.cli.output import JsonFlag, emit
from clipgraft.errors import InputError
from clipgraft.registry import current

RECIPE = "diffusion/genhancer:tiny"


def demo(
    out: Annotated[Path | None, typer.Option(help="Run directory [default: runs/genhancer-<n>].")] = None,
    json: JsonFlag = False,
) -> None:
    """Improve a tiny CLIP, measure it before and after, write a report."""
    began, status = time.monotonic(), {plugin.name: plugin.status for plugin in current().plugins}
    if idle := [name for name in ("toyworld", "diffusion") if status.get(name) != "ok"]:
        states = ", ".join(f"{name} ({status.get(name, 'not installed')})" for name in idle)
        packages = " ".join(f"clipgraft-{name}" for name in idle)
        raise InputError(f'the demo needs {states}: pip install {packages}, or in a checkout pip install ".[all]"')
    from clipgraft import retention
    from clipgraft.evaluation import records
    from clipgraft.evaluation.comparison import as_table, compare
    from clipgraft.execution import run_recipe
    from clipgraft.runner import flat
    from clipgraft_evaluation.report import write_report

    result = run_recipe(RECIPE, out=out, overrides=["threads=1"])  # more threads slow such small tensors down
    measured = json_format.loads((result.run / "evaluations.json").read_text("utf-8"))
    before, after = flat(measured["before"]), flat(measured["after"])
    page, seconds = write_report(result.run), time.monotonic() - began
    if json:
        paths = {"export": str(result.export), "report": str(page)}
        kept = {"forgetting": result.forgetting}
        return emit({"before": before, "after": after, **kept, **paths, "seconds": round(seconds, 1)})

    from rich.console import Console

    console, names = Console(highlight=False), ("before", "after")
    found = [records.read(result.run / "evaluation" / when) for when in names]
    console.print(as_table(compare(*found), names=names, title=f"{RECIPE} in {seconds:.0f} s", width=console.width))
    if rows := retention.read(result.run):
        console.print(as_table(rows, names=names, title="What was kept", width=console.width))
    print(f"model   {result.export}\nreport  {page}")
