"""``clipgraft merging opcm``: merge models one after another, now or whenever the next one arrives."""

from __future__ import annotations

import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from clipgraft.cli.output import JsonFlag, emit
from clipgraft_merging.merge_command import ModelArguments


def opcm(
    models: ModelArguments,
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The model that they were fine-tuned from; with --into the first."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Begin a merge here, an export that can grow.")
    ] = None,
    into: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Add to the merge in this export, with its settings.")
    ] = None,
    method: Annotated[
        str, typer.Option(metavar="NAME", help="opcm, or to compare: rescaled, task-arithmetic, average, ties.")
    ] = "opcm",
    alpha: Annotated[float, typer.Option(help="Share of singular values that is protected; 0 <= alpha < 1.")] = 0.5,
    mode: Annotated[str, typer.Option(metavar="code|paper", help="paper drops links to weak directions too.")] = "code",
    qkv: Annotated[
        str, typer.Option(metavar="split|fused", help="Project q, k and v each, or as one matrix.")
    ] = "split",
    compat: Annotated[
        str, typer.Option(metavar="none|fusionbench", help="fusionbench reproduces the official code's omissions.")
    ] = "none",
    scale: Annotated[float, typer.Option(help="Of task-arithmetic and ties.")] = 0.3,
    density: Annotated[float, typer.Option(help="Share of entries that ties keeps.")] = 0.2,
    json: JsonFlag = False,
) -> None:
    """Merge models one after another; more with --into later, without those before. Memory doesn't grow with them."""
    from clipgraft.errors import InputError
    from clipgraft.log import RunLog
    from clipgraft.registry import current
    from clipgraft_merging.opcm.merger import check_new, merge_into, new_state
    from clipgraft_merging.opcm.settings import ContinualSettings
    from clipgraft_merging.opcm.state import read_state
    from clipgraft_merging.weights.engine import open_inputs

    if (out is None) == (into is None):
        raise InputError("give --out DIR to begin a merge, or --into DIR to add to one")
    asked = ContinualSettings(
        method=method,
        alpha=alpha,
        mode=mode,
        qkv=qkv,
        compat=compat,
        scale=scale,
        density=density,  # type: ignore[arg-type]
    )
    started, folder = time.monotonic(), out or into
    assert folder is not None
    with redirect_stdout(sys.stderr):
        log, state = RunLog(), None
        if into is not None:
            state = read_state(into)
            if asked != ContinualSettings() and asked.as_dict() != state.settings.as_dict():
                raise InputError(f"{into} was made with {state.settings.as_dict()}; leave the settings out with --into")
        elif base is None:
            raise InputError("task vectors start at the model that was fine-tuned; give --base MODEL")
        inputs = open_inputs(models, base=base or (state and state.base), registry=current())
        state = state or new_state(inputs, asked)
        check_new(state, inputs)
        after = merge_into(folder, inputs, state, log=log, registry=current())
    if json:
        seconds = round(time.monotonic() - started, 3)
        emit({"out": str(folder), **after.as_dict(), "scale": after.scale, "seconds": seconds})
        return
    count = len(after.models)
    print(f"model: {folder} ({count} {'model' if count == 1 else 'models'} merged)")
