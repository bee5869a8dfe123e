"""``clipgraft llm reinforce-data``: ask teachers once about every crop and caption, and keep what they say."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from clipgraft.cli.output import JsonFlag, emit


class StoredAs(StrEnum):
    """Number formats of a store."""

    bf16 = "bf16"
    fp32 = "fp32"


def reinforce_data(
    data: Annotated[str, typer.Argument(metavar="SRC", help="Samples with captions: csv:FILE, plugin/name?key=value.")],
    teacher: Annotated[
        list[str], typer.Option(metavar="MODEL", help="Any model reference with a text tower; repeatable.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the store goes; the same command continues there.")],
    scale: Annotated[
        list[float] | None,
        typer.Option(metavar="NUMBER", help="Of each teacher's cosines; the model's own by default."),
    ] = None,
    captions: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Written captions: JSON lines with id and captions.")
    ] = None,
    most_captions: Annotated[int, typer.Option(min=1, help="Written captions of each sample.")] = 5,
    augmentations: Annotated[int, typer.Option(min=1, help="Crops of each picture.")] = 10,
    area: Annotated[tuple[float, float], typer.Option(help="Range of a crop's share of the picture.")] = (0.08, 1.0),
    operations: Annotated[int, typer.Option(min=0, help="Operations of RandAugment after each crop.")] = 2,
    magnitude: Annotated[float, typer.Option(min=0, max=30, help="Of the operations.")] = 9.0,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn.")] = 0,
    stored: Annotated[StoredAs, typer.Option(help="Of the embeddings.")] = StoredAs.bf16,
    rows: Annotated[int, typer.Option(min=1, help="Samples per file.")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Crops or captions per forward pass.")] = 64,
    json: JsonFlag = False,
) -> None:
    """Store teachers, e.g. clipgraft llm reinforce-data toyworld/images --teacher toyworld/teacher --out store"""
    import time
    from dataclasses import asdict

    from clipgraft.data import open_source
    from clipgraft.distributed import make_accelerator
    from clipgraft.encoders import load
    from clipgraft.errors import InputError
    from clipgraft.log import RunLog
    from clipgraft.registry import current
    from clipgraft_llm.reinforce.augment import ReplayableTransform
    from clipgraft_llm.reinforce.write import Teacher, write_store
    from clipgraft_llm.reinforce.written import WrittenCaptions

    if scale and len(scale) != len(teacher):
        raise InputError(f"{len(scale)} scales for {len(teacher)} teachers; give --scale once per --teacher, or never")
    if not 0 < area[0] <= area[1] <= 1:
        raise InputError(
            f"--area {area[0]:g} {area[1]:g} is no range of shares; give two numbers with 0 < low <= high <= 1"
        )
    began = time.monotonic()
    with redirect_stdout(sys.stderr):  # whatever libraries print
        device, registry = make_accelerator("fp32").device, current()
        source = open_source(data, registry=registry)
        if hasattr(source, "patterns"):
            raise InputError(f"{data} holds minimal pairs; give samples with captions (csv: or a dataset)")
        written = None if captions is None else WrittenCaptions(captions)
        teachers = [
            Teacher.of(name, load(name, registry=registry).to(device), scale=value)
            for name, value in zip(teacher, scale or [None] * len(teacher), strict=True)
        ]
        found = write_store(
            source,
            out,
            teachers=teachers,
            written=written,
            transform=ReplayableTransform(area=area, operations=operations, magnitude=magnitude),
            augmentations=augmentations,
            most_written=most_captions,
            seed=seed,
            stored=stored.value,
            rows=rows,
            batch_size=batch_size,
            log=RunLog(),
        )
    seconds = round(time.monotonic() - began, 1)
    told = [{"model": t.model, "dim": t.encoder.image.embed_dim, "scale": t.scale} for t in teachers]
    if json:
        emit({**asdict(found), "teachers": told, "augmentations": augmentations, "seconds": seconds})
        return
    print(
        f"{out}: {found.samples} samples x {augmentations} crops, {found.shards} files, {found.bytes / 2**20:.1f} MiB"
    )
    if found.skipped:
        print(f"{found.skipped} samples were left out, such as {', '.join(found.first_skipped[:3])}")
    if written is not None and found.without:
        print(f"{found.without} samples have no written caption; they take their own twice")
