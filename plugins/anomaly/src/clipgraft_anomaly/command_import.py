"""``clipgraft anomaly import``: official AnomalyCLIP prompts as an export of ours."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from clipgraft.cli.output import JsonFlag, emit


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Official AnomalyCLIP checkpoint (.pth).")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory to write.")],
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="The CLIP that the prompts were trained for.")
    ] = "open_clip:ViT-L-14-336-quickgelu/openai",
    json: JsonFlag = False,
) -> None:
    """Turn official AnomalyCLIP prompts into a detector that predict, eval and export take.

    Only a file of exactly the official tensors is opened, without unpickling anything else; its frozen token embeddings
    must be those of MODEL.
    """
    from clipgraft.checkpoint import write_export
    from clipgraft.encoders import load
    from clipgraft.files import sha256_of
    from clipgraft.registry import current
    from clipgraft_anomaly.anomalyclip.official import import_official

    with redirect_stdout(sys.stderr):
        encoder = load(model, registry=current()).eval()
        head = import_official(file, encoder)
        lineage = [{"imported": file.name, "sha256": sha256_of(file), "base": encoder.data.origin.uri}]
        folder = write_export(encoder, out, components={"anomalyclip": head}, lineage=lineage)
    emit({"export": str(folder), "file": str(file), "sha256": lineage[0]["sha256"]}) if json else print(folder)
