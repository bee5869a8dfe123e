"""``clipgraft eval``: measure a model."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from clipgraft.cli.output import JsonFlag, emit
from clipgraft.registry import current


class Precision(StrEnum):
    """Arithmetic of the towers."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Registered name, open_clip:ARCH[/TAG], hf:ORG/NAME or DIR.")
    ],
    on: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[?K=V][@SRC],...", help="Evaluators, each with settings and its own data if given."),
    ] = None,
    suite: Annotated[
        str | None, typer.Option(metavar="NAME|FILE.yaml", help="Evaluators with data by one name, or from a list.")
    ] = None,
    data: Annotated[str | None, typer.Option(metavar="SRC", help="Data of the evaluators that name none.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write metrics, and a row per sample, here.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 256,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that decode images; by default as many as are worth it.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep features here, under hashes of weights and data.")
    ] = None,
    precision: Annotated[
        Precision, typer.Option(help="Of the towers; auto is bf16 where the hardware is made for it.")
    ] = Precision.fp32,
    json: JsonFlag = False,
) -> None:
    """Measure a model, e.g. clipgraft eval toyworld/clip --on zero-shot --data toyworld/images?split=test"""
    from clipgraft import distributed, evaluation
    from clipgraft.encoders import load
    from clipgraft.evaluation import records
    from clipgraft.evaluation.suites import check_requested, requested
    from clipgraft.log import RunLog
    from clipgraft.performance import fast_precision, quick_products

    check_requested(on or (), suite, registry=current())
    with redirect_stdout(sys.stderr):  # whatever libraries print
        accelerator = distributed.make_accelerator("fp32")  # under torchrun each process encodes its share
        encoder = load(model, registry=current()).eval().to(accelerator.device)
        asked = fast_precision(accelerator.device.type) if precision is Precision.auto else precision.value
        with quick_products(accelerator.device):
            found = evaluation.evaluate(
                encoder,
                requested(on or (), suite, encoder, registry=current()),
                registry=current(),
                default_data=data,
                batch_size=batch_size,
                log=RunLog(is_main=accelerator.is_main_process),
                workers=workers,
                cache=cache,
                precision="bf16" if asked == "bf16" else "fp32",
            )
        if out is not None and accelerator.is_main_process:
            records.save(out, found)
    if not accelerator.is_main_process:
        return
    if json:
        results = {name: dict(e.metrics) for name, e in found.items()}
        spread = {name: {k: list(v) for k, v in e.intervals.items()} for name, e in found.items()}
        errors = {name: e.standard_errors for name, e in found.items()}
        emit({"model": model, "results": results, "intervals": spread, "standard_errors": errors})
        return
    for name, e in found.items():
        print(name)
        for metric, value in e.metrics.items():
            count, span, error = e.counts.get(metric), e.intervals.get(metric), e.standard_errors.get(metric)
            print(
                f"  {metric} {value:.4f}"
                + ("" if error is None else f" ± {error:.4f}")
                + (f" [{span[0]:.4f}, {span[1]:.4f}]" if span else "")
                + (f" ({count[0]} of {count[1]})" if count else "")
            )
