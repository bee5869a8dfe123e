"""``clipgraft embed``: the embeddings of any source, in one file."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from clipgraft.cli.evaluate import Precision
from clipgraft.cli.output import JsonFlag, emit


class DtypeName(StrEnum):
    """Numbers in the file."""

    fp32 = "fp32"
    fp16 = "fp16"


ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Registered name, open_clip:ARCH[/TAG], hf:ORG/NAME or DIR.")
]
BatchOption = Annotated[
    int | None, typer.Option(min=1, help="Images per forward pass; by default 32 on a CPU, 256 on a GPU.")
]
WorkersOption = Annotated[
    int | None, typer.Option(min=0, help="Decoding processes; by default one per core for more than 256 files.")
]
PrecisionOption = Annotated[
    Precision, typer.Option(help="auto measures a few images and takes bf16 where it is faster.")
]


def embed(
    model: ModelArgument,
    data: Annotated[str, typer.Option(metavar="SRC", help="folder:DIR, csv:FILE or a registered dataset.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Ends in .safetensors or .parquet.")],
    texts: Annotated[bool, typer.Option("--texts", help="Embed the captions instead of the images.")] = False,
    batch_size: BatchOption = None,
    workers: WorkersOption = None,
    precision: PrecisionOption = Precision.fp32,
    dtype: Annotated[DtypeName, typer.Option(help="Numbers in the file.")] = DtypeName.fp32,
    shard_size: Annotated[int, typer.Option(min=1, help="Samples per part: what an interruption can cost.")] = 2048,
    resume: Annotated[
        bool, typer.Option("--resume/--restart", help="Continue what was interrupted, or begin anew.")
    ] = True,
    json: JsonFlag = False,
) -> None:
    """Write embeddings, e.g. clipgraft embed toyworld/clip --data folder:photos --out photos.safetensors"""
    with redirect_stdout(sys.stderr):  # whatever libraries print
        from clipgraft.data import open_source
        from clipgraft.log import RunLog
        from clipgraft.registry import current
        from clipgraft_embedding.embed import embed as run
        from clipgraft_embedding.processes import on_device, process_group
        from clipgraft_embedding.store import check_suffix

        check_suffix(out)
        with process_group() as is_main:
            log = RunLog(is_main=is_main)
            encoder = on_device(model, registry=current())
            source = open_source(data, registry=current())
            found = run(
                encoder,
                source,  # type: ignore[arg-type]
                out=out,
                kind="texts" if texts else "images",
                model=reference(model),
                batch_size=batch_size,
                workers=workers,
                precision=precision.value,
                dtype=dtype.value,
                shard_size=shard_size,
                restart=not resume,
                log=log,
            )
    if not is_main:
        return
    about = found.about
    if json:
        emit(
            {
                "out": str(out), "model": about.model, "rows": about.rows, "dim": about.dim, "total": about.total,
                "skipped": about.skipped, "encoded": found.encoded, "seconds": round(found.seconds, 3),
                "per_second": round(found.rate, 2), "precision": about.precision, "max_cosine_error": found.error,
            }
        )  # fmt: skip
        return
    print(f"{out}: {about.rows} embeddings of {about.dim} numbers" + _skipped(about.skipped, about.total))
    if found.encoded:
        print(f"{found.encoded} samples in {found.seconds:.1f} s, {found.rate:.1f} per second, {about.precision}")


def reference(model: str) -> str:
    """What opens the model from another working folder too."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def _skipped(skipped: int, total: int) -> str:
    return f"; {skipped} of {total} samples could not be read" if skipped else ""
