"""``clipgraft merging collapse``: a CLIP-MoE as a plain CLIP."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from clipgraft.cli.output import JsonFlag, emit


def collapse(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A CLIP with mixtures of experts, such as an export.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory to write.")],
    json: JsonFlag = False,
) -> None:
    """Replace every mixture of experts by the mean of its experts: open_clip alone opens the result.

    Cost and size become those of the model before the experts. What the gates knew is lost; measure both.
    """
    from clipgraft.checkpoint import write_export
    from clipgraft.encoders import load
    from clipgraft.registry import current
    from clipgraft_merging.moe.collapse import collapse as to_dense
    from clipgraft_merging.moe.collapse import mixture_places

    with redirect_stdout(sys.stderr):
        encoder = load(model, registry=current()).eval()
        count, sha256 = len(mixture_places(encoder)), encoder.data.origin.sha256
        folder = write_export(to_dense(encoder), out, lineage=[{"collapsed": model, "base_sha256": sha256}])
    emit({"model": model, "export": str(folder), "mixtures": count}) if json else print(folder)
