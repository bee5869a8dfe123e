"""``clipgraft merging soup``: the mean of models."""

from __future__ import annotations

from typing import Annotated

import typer

from clipgraft.cli.output import JsonFlag
from clipgraft_merging.merge_command import ModelArguments, OutOption, merge_command


def soup(
    models: ModelArguments,
    out: OutOption,
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Where configuration and tokenizer come from; by default the first MODEL."),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Average models that were fine-tuned from one: the uniform soup."""
    from clipgraft_merging.soup.uniform import UniformSoup

    merge_command(models, base=base, make=lambda inputs, log: {out: UniformSoup()}, json=json)
