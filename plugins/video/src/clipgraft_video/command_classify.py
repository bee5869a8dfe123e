"""``clipgraft video classify``: which of the given labels suits each video of a folder."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipgraft.cli.output import JsonFlag, emit

if TYPE_CHECKING:
    from clipgraft.registry import Registry
    from clipgraft_video.model import VideoModel
    from clipgraft_video.sources import ClipConfig

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A run or export of this plugin, or any model reference.")
]
VideosOption = Annotated[str, typer.Option(metavar="DIR", help="A video file, or a folder with videos below.")]
FramesOption = Annotated[int, typer.Option(min=1, help="Frames per video.")]
RuleOption = Annotated[str, typer.Option(metavar="NAME", help="Which frames: tsn, dense, uniform, fps, ...")]
BatchOption = Annotated[int, typer.Option(min=1, help="Videos per forward pass.")]


def classify(
    model: ModelArgument,
    videos: VideosOption,
    labels: Annotated[str, typer.Option(metavar="FILE|A,B,C", help="File of class names, or names with commas.")],
    template: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Prompt with one {}; may be repeated. Default: bare names.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Labels to print per video.")] = 3,
    frames: FramesOption = 8,
    rule: RuleOption = "tsn",
    batch_size: BatchOption = 4,
    json: JsonFlag = False,
) -> None:
    """Label videos, e.g. clipgraft video classify toyworld/clip --videos DIR --labels running,walking"""
    from clipgraft.data.loader import class_prompts
    from clipgraft.distributed import make_accelerator
    from clipgraft.log import RunLog
    from clipgraft.registry import current
    from clipgraft_video.evaluate import class_texts, look
    from clipgraft_video.reading import Clips
    from clipgraft_video.sources import unlabelled

    names = names_of(labels)
    with redirect_stdout(sys.stderr):  # whatever libraries print
        opened = opened_model(model, registry=current()).to(make_accelerator("fp32").device)
        source = unlabelled(videos, clip=clip_of(opened, frames=frames, rule=rule))
        texts = class_texts(opened, [list(class_prompts(name, template or ["{}"])) for name in names])
        seen = look(opened, Clips(source), texts, batch_size=batch_size, log=RunLog(), title="classifying")
    rows = list[dict[str, Any]]()
    for sample, row in zip(seen.samples, seen.rows, strict=True):
        best = row.topk(min(top, len(names)))
        found = [{"label": names[k], "probability": p} for p, k in zip(*(x.tolist() for x in best), strict=True)]
        rows.append({"video": sample.id, "labels": found})
    if json:
        return emit({"model": model, "videos": rows, "skipped": seen.bad.first})
    for row in rows:
        told = ", ".join(f"{found['label']} {found['probability']:.3f}" for found in row["labels"])
        print(f"{row['video']}: {told}")
    for line in seen.bad.first:
        print(f"skipped {line}", file=sys.stderr)


def names_of(labels: str) -> list[str]:
    """Names from a file of any known form, or separated by commas; two or more, none twice."""
    from clipgraft.errors import InputError
    from clipgraft_video.class_lists import read_classes

    if Path(labels).expanduser().is_file():
        names = list(read_classes(labels).names)
    elif "," in labels:
        names = [name.strip() for name in labels.split(",") if name.strip()]
    else:
        raise InputError(f"labels {labels!r} is no file; give one, or names with commas: running,walking")
    if len(names) < 2 or len(set(names)) < len(names):
        raise InputError(f"labels need two different names or more, got {', '.join(names) or 'none'}")
    return names


def opened_model(reference: str, *, registry: Registry) -> VideoModel:
    """The model, which needs a text tower."""
    from clipgraft.errors import InputError
    from clipgraft_video.model import open_video_model

    model = open_video_model(reference, registry=registry)
    if model.encoder.text is None:
        raise InputError(f"{reference} has no text tower; labels and queries are texts, give a CLIP with one")
    return model


def clip_of(model: VideoModel, *, frames: int, rule: str) -> ClipConfig:
    """Clips at the model's own size."""
    from clipgraft.errors import unknown_name
    from clipgraft_video.frame_rules import RULES
    from clipgraft_video.sources import ClipConfig

    if rule not in RULES:
        raise unknown_name("rule", rule, RULES)
    return ClipConfig(frames=frames, rule=rule, size=model.encoder.preprocess.size[0])
