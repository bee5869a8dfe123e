"""``clipgraft eval``: measure a model."""

from __future__ import annotations

import json as json_
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from clipgraft.cli.output import JsonFlag, emit
from clipgraft.registry import current


def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Registered name, open_clip:ARCH[/TAG], hf:ORG/NAME or DIR.")
    ],
    on: Annotated[
        list[str], typer.Option(metavar="NAME[@SRC],...", help="Evaluators, each with its own data if given.")
    ],
    data: Annotated[str | None, typer.Option(metavar="SRC", help="Data of the evaluators that name none.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write one JSON line per sample here.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 256,
    json: JsonFlag = False,
) -> None:
    """Measure a model, e.g. clipgraft eval toyworld/clip --on zero-shot --data toyworld/images?split=test"""
    from clipgraft import evaluation, files
    from clipgraft.encoders import load

    nodes = [node.strip() for text in on for node in text.split(",") if node.strip()]
    with redirect_stdout(sys.stderr):  # whatever libraries print
        found = evaluation.evaluate(
            load(model, registry=current()).eval(), nodes, registry=current(), default_data=data, batch_size=batch_size
        )
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            for name, e in found.items():
                lines = "".join(json_.dumps(dict(sample)) + "\n" for sample in e.samples)
                files.write_text(out / f"{name.replace('/', '-').replace('@', '--')}.jsonl", lines)
    if json:
        emit({"model": model, "results": {name: dict(e.metrics) for name, e in found.items()}})
        return
    for name, e in found.items():
        print(name)
        for metric, value in e.metrics.items():
            count = e.counts.get(metric)
            print(f"  {metric} {value:.4f}" + (f" ({count[0]} of {count[1]})" if count else ""))
