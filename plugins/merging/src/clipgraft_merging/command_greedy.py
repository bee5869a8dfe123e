"""``clipgraft merging greedy``: the mean of those models that help on held-out data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipgraft.cli.output import JsonFlag
from clipgraft_merging.merge_command import ModelArguments, OutOption, merge_command

if TYPE_CHECKING:
    from clipgraft.log import RunLog
    from clipgraft_merging.weights.engine import Inputs, Merger


def greedy(
    models: ModelArguments,
    out: OutOption,
    on: Annotated[str, typer.Option(metavar="NAME[?K=V][@SRC]", help="The evaluator that judges.")] = "zero-shot",
    data: Annotated[str | None, typer.Option(metavar="SRC", help="Held-out data, if --on names none.")] = None,
    metric: Annotated[str | None, typer.Option(help="Its metric; by default the first it reports.")] = None,
    accept: Annotated[
        str, typer.Option(metavar="gt|ge", help="A model stays if the score rises, or if it doesn't fall.")
    ] = "gt",
    min_delta: Annotated[float, typer.Option(min=0, help="What the score must rise by.")] = 0.0,
    patience: Annotated[int | None, typer.Option(min=1, help="Stop after this many rejections in a row.")] = None,
    leave_one_out: Annotated[
        bool, typer.Option("--leave-one-out", help="Also judge the soup without each of its models.")
    ] = False,
    ledger: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Everything that was judged; by default OUT.greedy.json.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 256,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes that decode images.")] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Where configuration and tokenizer come from; by default the first MODEL."),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Average the models that help: best first, each stays if a held-out score says so.

    Stopped, it goes on where it was when called again.
    """
    from clipgraft.config.schema import evaluator_named
    from clipgraft.registry import current
    from clipgraft_merging.soup.greedy import GreedyRule, GreedySoup, search
    from clipgraft_merging.soup.judge import EvaluatorJudge

    rule = GreedyRule(accept=accept, min_delta=min_delta, patience=patience)  # type: ignore[arg-type]
    book = ledger or out.with_name(f"{out.name}.greedy.json")
    found: list[GreedySoup] = []

    def make(inputs: Inputs, log: RunLog) -> dict[Path, Merger]:
        judge = EvaluatorJudge(
            inputs.described, evaluator_named(on), registry=current(), data=data, metric=metric,
            batch_size=batch_size, workers=workers, log=log,
        )  # fmt: skip
        book.parent.mkdir(parents=True, exist_ok=True)
        chosen = search(inputs, judge, rule=rule, ledger=book, log=log, leave_one_out=leave_one_out)
        names = ", ".join(inputs.models[i].ref for i in chosen.ingredients)
        log.info(f"the soup of {len(chosen.ingredients)} of {len(inputs.models)} models: {names}")
        found.append(chosen)
        return {out: chosen}

    merge_command(models, base=base, make=make, json=json, more={"ledger": str(book)})
