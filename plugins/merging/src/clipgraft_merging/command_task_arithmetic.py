"""``clipgraft merging task-arithmetic``: a base plus scaled task vectors."""

from __future__ import annotations

from typing import Annotated

import typer

from clipgraft.cli.output import JsonFlag
from clipgraft_merging.merge_command import BaseOption, ModelArguments, OutOption, merge_command


def task_arithmetic(
    models: ModelArguments,
    base: BaseOption,
    out: OutOption,
    scale: Annotated[
        list[float] | None,
        typer.Option(help="Once for all models, or once per model in their order; below 0 to forget. [default: 0.3]"),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Add what models have learnt to the base that they were fine-tuned from, or subtract it."""
    from clipgraft_merging.task_arithmetic.arithmetic import TaskArithmetic

    merger = TaskArithmetic(scales=tuple(scale or (0.3,)))
    merge_command(models, base=base, make=lambda inputs, log: {out: merger}, json=json)
