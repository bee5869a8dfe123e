"""``clipgraft llm import-long-clip``: an official Long-CLIP checkpoint as an export that open_clip opens."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from clipgraft.cli.output import JsonFlag, emit


def import_long_clip(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Official Long-CLIP checkpoint (.pt) or safetensors.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory to write.")],
    arch: Annotated[
        str | None, typer.Option(metavar="ARCH", help="open_clip architecture; known by shapes for B/16 and L/14.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Write an official Long-CLIP model with one table of positions, as any CLIP: open_clip alone opens it."""
    import open_clip

    from clipgraft.checkpoint import write_export
    from clipgraft.errors import unknown_name
    from clipgraft.files import sha256_of
    from clipgraft_llm.longclip.official import official_encoder

    with redirect_stdout(sys.stderr):
        config = None if arch is None else open_clip.get_model_config(arch)
        if arch is not None and config is None:
            raise unknown_name("open_clip architecture", arch, open_clip.list_models())
        encoder = official_encoder(file, config=config)
        lineage = [{"imported": file.name, "sha256": sha256_of(file)}]
        folder = write_export(encoder, out, lineage=lineage)
    found = {"export": str(folder), "context": encoder.data.model_config["text_cfg"]["context_length"]}
    emit(found | {"sha256": lineage[0]["sha256"]}) if json else print(folder)
