"""``clipgraft compare``: whether one model is better than another, metric by metric."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from clipgraft.cli.output import JsonFlag, emit
from clipgraft.registry import current


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="A model, a folder of clipgraft eval --out, or a run.")],
    b: Annotated[
        str | None,
        typer.Argument(metavar="[B]", help="The one that is better or worse than A; left out: run A before and after."),
    ] = None,
    on: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[?K=V][@SRC],...", help="Evaluators, each with its own data if given."),
    ] = None,
    suite: Annotated[
        str | None, typer.Option(metavar="NAME|FILE.yaml", help="Evaluators with data by one name, or from a list.")
    ] = None,
    data: Annotated[str | None, typer.Option(metavar="SRC", help="Data of the evaluators that name none.")] = None,
    alpha: Annotated[float, typer.Option(help="Share of false verdicts that is accepted over the whole table.")] = 0.05,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write comparison.json, and what was measured as a/ and b/.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 256,
    json: JsonFlag = False,
) -> None:
    """Tell whether B is better than A, e.g. clipgraft compare toyworld/clip runs/finetune-1/export --suite retention"""
    from clipgraft import files
    from clipgraft.errors import InputError
    from clipgraft.evaluation import comparison, records
    from clipgraft.log import RunLog
    from clipgraft_evaluation import pooling_table
    from clipgraft_evaluation.compare import both_of_run, measure_both

    if not 0 < alpha < 1:
        raise InputError(f"--alpha is {alpha}; give a share between 0 and 1, such as 0.05")
    log = RunLog()
    with redirect_stdout(sys.stderr):  # whatever libraries print
        if b is None and (on or suite or data):
            raise InputError("--on, --suite and --data measure models; name a second one")
        both = (
            both_of_run(a)
            if b is None
            else measure_both(
                a, b, on=on or (), suite=suite, data=data, batch_size=batch_size, registry=current(), log=log
            )
        )
        rows = comparison.compare(both.a, both.b, alpha=alpha, log=log)
    sides, names = ((a, b), ("A", "B")) if b else ((f"{a} before", f"{a} after"), ("before", "after"))
    tables = pooling_table.pooling_tables(both.a, both.b)
    document = {"a": sides[0], "b": sides[1], "alpha": alpha, "rows": [row.as_dict() for row in rows]}
    document |= {"poolings": [table.as_dict() for table in tables]} if tables else {}
    if out is not None:
        for side, found in (("a", both.a), ("b", both.b)):
            records.save(out / side, found)
        files.write_json(out / "comparison.json", document)
    if both.only_one:
        log.info(f"only one side has {', '.join(both.only_one)}")
    if json:
        return emit(document)

    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    console.print(f"{names[0]}  {sides[0]}\n{names[1]}  {sides[1]}" if b else a, markup=False, soft_wrap=True)
    console.print(comparison.as_table(rows, names=names, width=console.width))
    for table in tables:
        console.print(pooling_table.as_table(table, names=names))
    for name in dict.fromkeys(row.evaluator for row in rows):
        sizes, n = (
            (len(both.a[name].samples), len(both.b[name].samples)),
            next(r.n for r in rows if r.evaluator == name),
        )
        if n is not None and sizes != (n, n):
            console.print(f"{name}: {n} samples are on both sides, of {sizes[0]} and {sizes[1]}", markup=False)
