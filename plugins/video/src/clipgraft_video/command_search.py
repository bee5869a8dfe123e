"""``clipgraft video search``: the videos of a folder that suit a text best."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import Annotated

import typer

from clipgraft.cli.output import JsonFlag, emit
from clipgraft_video.command_classify import (
    BatchOption,
    FramesOption,
    ModelArgument,
    RuleOption,
    VideosOption,
    clip_of,
    opened_model,
)


def search(
    model: ModelArgument,
    videos: VideosOption,
    query: Annotated[list[str], typer.Option(metavar="TEXT", help="What to look for; may be repeated.")],
    top: Annotated[int, typer.Option(min=1, help="Videos to print per query.")] = 5,
    frames: FramesOption = 8,
    rule: RuleOption = "tsn",
    batch_size: BatchOption = 4,
    json: JsonFlag = False,
) -> None:
    """Find videos, e.g. clipgraft video search toyworld/clip --videos DIR --query "a red moon going left" """
    import torch

    from clipgraft.distributed import make_accelerator
    from clipgraft.errors import InputError
    from clipgraft.log import RunLog
    from clipgraft.registry import current
    from clipgraft_video.evaluate import look
    from clipgraft_video.reading import Clips
    from clipgraft_video.sources import unlabelled

    if blank := [text for text in query if not text.strip()]:
        raise InputError(f"query {blank[0]!r} says nothing; write what the video shows")
    with redirect_stdout(sys.stderr):  # whatever libraries print
        opened = opened_model(model, registry=current()).to(make_accelerator("fp32").device)
        source = unlabelled(videos, clip=clip_of(opened, frames=frames, rule=rule))
        seen = look(opened, Clips(source), None, batch_size=batch_size, log=RunLog(), title="embedding")
        with torch.no_grad():
            scores = opened.texts(list(query)).float().cpu() @ seen.rows.T  # (queries, videos)
    found = {}
    for text, row in zip(query, scores, strict=True):
        best = row.topk(min(top, len(row)))
        pairs = zip(*(x.tolist() for x in best), strict=True)
        found[text] = [{"video": seen.samples[k].id, "score": score} for score, k in pairs]
    if json:
        return emit({"model": model, "queries": found, "skipped": seen.bad.first})
    for text, rows in found.items():
        print(f"{text}:")
        for row in rows:
            print(f"  {row['score']:.3f}  {row['video']}")
    for line in seen.bad.first:
        print(f"skipped {line}", file=sys.stderr)
