"""What the merging commands share: their arguments, and one merge from references to a folder that says what it is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipgraft.cli.output import emit

if TYPE_CHECKING:
    from clipgraft.log import RunLog
    from clipgraft_merging.weights.engine import Inputs, Merger

ModelArguments = Annotated[
    list[str],
    typer.Argument(metavar="MODEL...", help="Fine-tuned models: DIR, FILE.safetensors, RUN or any reference."),
]
BaseOption = Annotated[str, typer.Option(metavar="MODEL", help="The model that they were fine-tuned from.")]
OutOption = Annotated[Path, typer.Option(metavar="DIR", help="Export to write; an earlier export there is replaced.")]


def merge_command(
    models: Sequence[str],
    *,
    base: str | None,
    make: Callable[[Inputs, RunLog], Mapping[Path, Merger]],
    json: bool,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Open, merge with what ``make`` returns per folder, and tell: paths, or one JSON document."""
    from clipgraft.log import RunLog
    from clipgraft.registry import current
    from clipgraft_merging.weights.engine import merge_each, open_inputs
    from clipgraft_merging.weights.export import lineage

    started = time.monotonic()
    with redirect_stdout(sys.stderr):  # whatever libraries print
        log = RunLog()
        inputs = open_inputs(models, base=base, registry=current())
        if left := sorted({name for c in inputs.all if c.facts is not None for name in c.facts.components}):
            log.info(f"merging encoders only; these components of the inputs stay behind: {', '.join(left)}")
        outs = make(inputs, log)
        merge_each(outs, inputs, log=log, registry=current())
        records = [{"out": str(out), **lineage(inputs, merger)} for out, merger in outs.items()]
    if json:
        seconds = round(time.monotonic() - started, 3)
        document = records[0] if len(records) == 1 else {"results": records}
        emit({**document, **(more or {}), "tensors": len(inputs.keys), "seconds": seconds})
        return
    for record in records:
        print(f"model: {record['out']}")
