"""``clipgraft run``: a recipe on a model."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from clipgraft.cli.output import JsonFlag, SetOption, emit
from clipgraft.errors import InputError


def run(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE[:PRESET]", help="See: clipgraft list recipes.")
    ] = None,
    config: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="YAML over the recipe's; repeatable.")
    ] = None,
    set_: SetOption = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Run directory. Default: runs/RECIPE-N.")] = None,
    resume: Annotated[Path | None, typer.Option(metavar="DIR", help="Continue an interrupted run.")] = None,
    from_: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="RUN", help="Repeat this run, and tell what is otherwise now (RUN/config.yaml)."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Short for --set seed=N.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, list the stages, do nothing.")] = False,
    json: JsonFlag = False,
) -> None:
    """Run a recipe, e.g. clipgraft run core/finetune --set model.from=DIR --set data.from=csv:pairs.csv"""
    if resume is not None and (recipe is not None or out is not None):
        raise InputError("--resume DIR knows its recipe and directory; leave RECIPE and --out out")
    from clipgraft.execution import run_recipe

    with redirect_stdout(sys.stderr):  # whatever libraries print
        result = run_recipe(
            recipe,
            configs=config or (),
            overrides=set_ or (),
            out=out,
            resume=resume,
            repeat=from_,
            seed=seed,
            dry_run=dry_run,
        )
    from clipgraft import distributed

    if distributed.rank():  # one process of several speaks
        return
    if json:
        emit(result.as_dict())
        return
    if dry_run:
        print("nothing is wrong with this run, and nothing was done")
        return
    print(f"{result.status}: {result.steps} steps in {result.seconds:.0f} s, {result.run}")
    for name, value in result.metrics.items():
        print(f"  {name} {value:.4f}")
    if result.export is not None:
        print(f"model: {result.export}")
