"""``clipgraft merging ties``: task vectors trimmed and rid of conflicts."""

from __future__ import annotations

from typing import Annotated

import typer

from clipgraft.cli.output import JsonFlag
from clipgraft_merging.merge_command import BaseOption, ModelArguments, OutOption, merge_command


def ties(
    models: ModelArguments,
    base: BaseOption,
    out: OutOption,
    density: Annotated[
        float, typer.Option(help="Share of each task vector that stays, by magnitude; 0.2 is 20 %.")
    ] = 0.2,
    scale: Annotated[float, typer.Option(help="Of the merged task vector.")] = 1.0,
    merge: Annotated[
        str, typer.Option(metavar="mean|sum", help="How agreeing numbers become one; with sum, 0.3 is a usual scale.")
    ] = "mean",
    keep: Annotated[
        str, typer.Option(metavar="strict|compat", help="compat keeps one number more, as the official code does.")
    ] = "strict",
    json: JsonFlag = False,
) -> None:
    """Merge models after trimming small changes and letting each number's models vote on its sign."""
    from clipgraft_merging.ties.merger import Ties

    merger = Ties(density=density, scale=scale, keep=keep, merge_by=merge)  # type: ignore[arg-type]
    merge_command(models, base=base, make=lambda inputs, log: {out: merger}, json=json)
