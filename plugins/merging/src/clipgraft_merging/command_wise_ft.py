"""``clipgraft merging wise-ft``: between a model and its fine-tuned version."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipgraft.cli.output import JsonFlag
from clipgraft_merging.merge_command import BaseOption, OutOption, merge_command

if TYPE_CHECKING:
    from clipgraft.log import RunLog
    from clipgraft_merging.weights.engine import Inputs, Merger


def wise_ft(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The fine-tuned model: DIR, RUN or any reference.")],
    base: BaseOption,
    out: OutOption,
    alpha: Annotated[
        str, typer.Option(metavar="A[,A...]", help="0 is the base, 1 the model; several make DIR/alpha-A each.")
    ] = "0.5",
    block: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN=A", help="Another A for tensors or blocks, such as visual.3=0.2 or text.*=0."),
    ] = None,
    extrapolate: Annotated[bool, typer.Option("--extrapolate", help="Allow A outside of [0, 1].")] = False,
    fisher: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Twice: importances of the base's and of the model's numbers, safetensors."),
    ] = None,
    floor: Annotated[float, typer.Option(help="The least importance, with --fisher.")] = 1e-6,
    json: JsonFlag = False,
) -> None:
    """Interpolate between a base and a model fine-tuned from it; several A are written from one read."""
    from clipgraft.errors import InputError
    from clipgraft.registry import current
    from clipgraft_merging.weights.engine import open_checkpoint
    from clipgraft_merging.wise_ft.interpolation import WiseFt

    alphas = [_number(text, "--alpha") for text in alpha.split(",")]
    if len(set(alphas)) < len(alphas):
        raise InputError(f"--alpha {alpha} names a value twice")
    blocks = {}
    for text in block or ():
        pattern, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--block {text!r}: expected PATTERN=A, such as visual.3=0.2")
        blocks[pattern] = _number(value, "--block")
    if fisher and len(fisher) != 2:
        raise InputError(f"--fisher was given {len(fisher)} times; give it twice, for the base and for the model")
    if len(alphas) > 1 and (out / "clipgraft.json").exists():
        raise InputError(f"{out} is an export, and several alphas are folders in --out; choose another folder")

    def make(inputs: Inputs, log: RunLog) -> dict[Path, Merger]:
        opened = [open_checkpoint(file, registry=current()) for file in fisher or ()]
        fishers = (opened[0], opened[1]) if opened else None
        folders = [out] if len(alphas) == 1 else [out / f"alpha-{a:g}" for a in alphas]
        return {
            folder: WiseFt(alpha=a, blocks=blocks, extrapolate=extrapolate, fishers=fishers, floor=floor)
            for folder, a in zip(folders, alphas, strict=True)
        }

    merge_command([model], base=base, make=make, json=json)


def _number(text: str, option: str) -> float:
    from clipgraft.errors import InputError

    try:
        return float(text)
    except ValueError:
        raise InputError(f"{option}: {text!r} is no number") from None
