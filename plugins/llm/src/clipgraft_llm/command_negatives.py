"""``clipgraft llm negatives``: write wrong captions by rule, to read, to edit, or to train on."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from clipgraft.cli.output import JsonFlag, emit


class RuleName(StrEnum):
    """Rules that make captions wrong."""

    swap_heads = "swap-heads"
    swap_modifiers = "swap-modifiers"
    swap_phrases = "swap-phrases"
    replace = "replace"


def negatives(
    data: Annotated[str, typer.Argument(metavar="SRC", help="Samples with captions: csv:FILE, plugin/name?key=value.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="JSON lines with id, caption, negatives.")],
    rule: Annotated[list[RuleName] | None, typer.Option(help="Which rules; all of them by default.")] = None,
    most: Annotated[int, typer.Option(min=1, help="Wrong captions of each caption.")] = 4,
    json: JsonFlag = False,
) -> None:
    """Write wrong captions, e.g. clipgraft llm negatives toyworld/crowds --out wrong.jsonl"""
    from clipgraft.data import open_source
    from clipgraft.errors import InputError
    from clipgraft.log import RunLog
    from clipgraft.registry import current
    from clipgraft_llm.negatives.rules import RULES, Rule
    from clipgraft_llm.negatives.written import write

    if not out.parent.is_dir():
        raise InputError(f"{out.parent} is no folder; make it, or choose another --out")
    with redirect_stdout(sys.stderr):  # whatever libraries print
        source = open_source(data, registry=current())
        if hasattr(source, "patterns"):
            raise InputError(f"{data} holds minimal pairs; give samples with captions (csv: or a dataset)")
        chosen: list[Rule] = [one.value for one in rule] if rule else list(RULES)
        counts = write(source, out, rules=chosen, most=most, log=RunLog())
    if json:
        emit({"file": str(out), "rules": chosen, **counts})
    else:
        print(
            f"{out}: {counts['negatives']} wrong captions of {counts['captions']}; "
            f"{counts['without']} captions have none"
        )
