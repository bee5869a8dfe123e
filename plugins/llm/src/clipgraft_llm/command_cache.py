"""``clipgraft llm cache``: ask a text model once about every caption of a data source."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from clipgraft.cli.output import JsonFlag, emit


class Stored(StrEnum):
    """Number formats of a cache."""

    bf16 = "bf16"
    fp32 = "fp32"


class PoolingName(StrEnum):
    """How hidden states become one vector."""

    mean = "mean"
    last = "last"
    cls = "cls"


class AttentionName(StrEnum):
    """Which tokens a token sees."""

    native = "native"
    bidirectional = "bidirectional"


class DTypeName(StrEnum):
    """Number formats of the text model's weights."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


def cache(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Text model: DIR, ORG/NAME of the hub, or a head such as plugin/name."),
    ],
    data: Annotated[str, typer.Option(metavar="SRC", help="Samples with captions: csv:FILE, plugin/name?key=value.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where features go; the same command continues there.")],
    template: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Prompt with {} once; \\n is a line break. Default: the model's.")
    ] = None,
    pooling: Annotated[PoolingName | None, typer.Option(help="Default: the model's own, else mean.")] = None,
    attention: Annotated[AttentionName | None, typer.Option(help="Default: the model's own, else native.")] = None,
    max_length: Annotated[int | None, typer.Option(min=4, help="Tokens of a text, prompt included.")] = None,
    dtype: Annotated[DTypeName, typer.Option(help="Of the text model's weights.")] = DTypeName.fp32,
    stored: Annotated[Stored, typer.Option(help="Of the features.")] = Stored.bf16,
    rows: Annotated[int, typer.Option(min=1, help="Samples per file.")] = 4096,
    batch_size: Annotated[int, typer.Option(min=1, help="Captions per forward pass.")] = 64,
    json: JsonFlag = False,
) -> None:
    """Keep text features, e.g. clipgraft llm cache toyworld/text-teacher --data toyworld/images --out features"""
    import time
    from functools import partial

    from clipgraft.data import open_source
    from clipgraft.distributed import make_accelerator
    from clipgraft.errors import InputError
    from clipgraft.log import RunLog
    from clipgraft.registry import current
    from clipgraft_llm.cache.build import build_cache
    from clipgraft_llm.tower.language_model import read_language_model
    from clipgraft_llm.tower.model_folder import find_model
    from clipgraft_llm.tower.settings import TextModelConfig, settled

    began = time.monotonic()
    with redirect_stdout(sys.stderr):  # whatever libraries print
        accelerator = make_accelerator("fp32")
        folder = find_model(model, registry=current())
        asked = TextModelConfig(
            model=model,
            template=None if template is None else template.replace("\\n", "\n"),
            pooling=pooling and pooling.value,
            attention=attention and attention.value,
            max_length=max_length,
            dtype=dtype.value,
        )
        settings = settled(asked, folder)
        source = open_source(data, registry=current())
        if hasattr(source, "patterns"):
            raise InputError(f"{data} holds minimal pairs; features are kept of captions (csv: or a dataset)")
        built = build_cache(
            source,
            out,
            folder=folder,
            settings=settings,
            read=partial(read_language_model, folder, settings),
            log=RunLog(is_main=accelerator.is_main_process),
            stored=stored.value,
            rows=rows,
            batch_size=batch_size,
            device=accelerator.device,
        )
    seconds = time.monotonic() - began
    if not accelerator.is_main_process:
        return
    if json:
        emit({"model": model, "data": data, "settings": settings.as_dict(), **built.as_dict(), "seconds": seconds})
        return
    print(f"{built.folder}: {built.captions} captions of {built.samples} samples, {built.bytes / 2**20:.1f} MiB")
    if built.reused:
        print(f"{built.reused} of {built.shards} files were there")
    if built.cut:
        print(
            f"{built.cut} captions are longer than {settings.max_length} tokens and lost words at their end, such as "
            f"{', '.join(built.first_cut[:3])}; --max-length keeps more"
        )
    if built.skipped:
        print(f"{built.skipped} samples have no caption or can't be read, such as {', '.join(built.first_skipped[:3])}")
