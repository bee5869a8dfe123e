"""``clipgraft merging fuse``: a CLIP with a second tower's patch tokens, as one model."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from clipgraft.cli.output import JsonFlag, emit


def fuse(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The CLIP, whose embeddings stay.")],
    second: Annotated[str, typer.Option(metavar="REF", help="A DINOv2 directory or hf: id, or any model reference.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory to write.")],
    mode: Annotated[str, typer.Option(help="add, interleave or concat.")] = "interleave",
    share: Annotated[float, typer.Option(min=0, max=1, help="For add: of the first tower.")] = 0.5,
    norm: Annotated[bool, typer.Option("--norm", help="A LayerNorm without weights per tower first.")] = False,
    width: Annotated[int | None, typer.Option(min=1, help="Map both towers to this width.")] = None,
    layers: Annotated[str, typer.Option(metavar="I,J,...", help="Blocks of CLIP's tower to average.")] = "",
    second_layers: Annotated[str, typer.Option(metavar="I,J,...", help="Blocks of the second tower to average.")] = "",
    json: JsonFlag = False,
) -> None:
    """Put a second, frozen tower beside CLIP's: what reads patch tokens reads both, everything else stays CLIP's.

    Measure with an evaluator that reads tokens, e.g. clipgraft eval DIR --on "linear-probe?on=tokens"
    """
    from clipgraft.checkpoint import write_export
    from clipgraft.config.schema import GraftNode
    from clipgraft.encoders import apply_grafts, load
    from clipgraft.errors import InputError
    from clipgraft.registry import current

    try:
        levels = [[int(i) for i in text.split(",") if i.strip()] for text in (layers, second_layers)]
    except ValueError:
        raise InputError(f"blocks are whole numbers, as in 0,1,-1; got {layers or second_layers!r}") from None
    settings: dict[str, Any] = {"second": second, "mode": mode, "share": share, "norm": norm, "width": width}
    settings |= {"layers": levels[0], "second_layers": levels[1]}
    with redirect_stdout(sys.stderr):
        encoder = load(model, registry=current()).eval()
        base = {"fused": model, "base_sha256": encoder.data.origin.sha256, "second": second}
        encoder = apply_grafts(encoder, [GraftNode(use="merging/two-towers", **settings)], current())
        folder = write_export(encoder, out, lineage=[base])
    grid = encoder.image.grid
    found = {"model": model, "export": str(folder), "width": encoder.image.width, "grid": grid}
    emit(found) if json else print(f"{folder}: tokens of width {encoder.image.width} on a grid of {grid}")
