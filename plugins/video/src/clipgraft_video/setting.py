"""What every recipe of this plugin does before it builds its stage: check the data, texts and pixel statistics."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from clipgraft.data.base import Source, entry_of
from clipgraft.data.loader import class_prompts
from clipgraft.encoders.base import Encoder
from clipgraft.errors import ClipgraftError, InputError
from clipgraft_video.class_lists import read_classes
from clipgraft_video.config import Statistics, VideoRunConfig, VideoTextConfig
from clipgraft_video.mixing import Mixing
from clipgraft_video.model import VideoModel
from clipgraft_video.stage import VideoStage

if TYPE_CHECKING:
    from clipgraft.runner import Run

CLIP_STATISTICS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def standardised(encoder: Encoder, statistics: Statistics) -> Encoder:
    """``encoder`` with other pixel statistics, which its export keeps."""
    if statistics != "model":
        mean, std = CLIP_STATISTICS if statistics == "clip" else IMAGENET_STATISTICS
        encoder.data.preprocess = replace(encoder.data.preprocess, mean=mean, std=std)
    return encoder


def class_prompt_lists(source: Source, text: VideoTextConfig) -> list[list[str]]:
    """Texts per class: templates around the name; a class that the descriptions tell has its description alone."""
    templates = text.templates or tuple(source.templates) or ("{}",)
    prompts = [list(class_prompts(name, templates)) for name in source.classes]
    if text.descriptions is not None:
        told = read_classes(text.descriptions).descriptions
        if missing := [name for name in source.classes if name not in told]:
            raise InputError(
                f"{text.descriptions} describes no class {missing[0]!r}; {len(missing)} of {len(source.classes)} miss"
            )
        prompts = [[told[name]] for name in source.classes]
    return prompts


def problems_of(run: Run, config: VideoRunConfig) -> list[str]:
    """What can be seen before any work: size, classes and labels, captions, texts that are too long."""
    problems = []
    try:
        source, encoder = run.train_source(), run.encoder
        size = getattr(getattr(source, "clip", None), "size", None)
        if size is not None and (size, size) != encoder.preprocess.size:
            side = encoder.preprocess.size[0]
            problems.append(f"frames have {size} pixels, the model takes {side}; write size={side} into data.from")
        if encoder.text is None:
            problems.append(f"{config.model.from_} has no text tower; videos are told apart by texts")
        elif config.objective == "captions":
            if bare := _first_bare(source):
                problems.append(f"{source.name}: {bare} has no caption; the objective captions needs one per video")
        else:
            problems += _label_problems(source)
            if not problems:
                _lengths(run, class_prompt_lists(source, config.text), encoder)
    except ClipgraftError as error:
        problems.append(str(error))
    return problems


def _first_bare(source: Source) -> str | None:
    """A video without a caption among the first thousand."""
    for index in range(min(len(source), 1000)):
        entry = entry_of(source, index)
        if not entry.captions:
            return entry.id
    return None


def _label_problems(source: Source) -> list[str]:
    if len(source.classes) < 2:
        return [f"{source.name} names {len(source.classes)} classes; give a list with labels, or folders of classes"]
    files = getattr(source, "files", None)
    if files is None:
        return []
    counts = [0] * len(source.classes)
    for file in files:
        if file.label is None:
            return [f"{source.name}: {file.id} has no label"]
        counts[file.label] += 1
    empty = [name for name, count in zip(source.classes, counts, strict=True) if not count]
    more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
    return [f"{source.name} has no video of the class {empty[0]!r}{more}"] if empty else []


def _lengths(run: Run, prompts: list[list[str]], encoder: Encoder) -> None:
    """Say how many class texts fill the context, since they are cut there."""
    flat = [text for texts in prompts for text in texts]
    ids = encoder.tokenizer(flat)
    full = int((ids[:, -1] != encoder.tokenizer.pad_id).sum())
    if full:
        run.log.info(f"{full} of {len(flat)} class texts fill the context of {ids.shape[1]} tokens and may be cut")


def stage_of(
    run: Run, config: VideoRunConfig, model: VideoModel, *, kind: type[VideoStage] = VideoStage, **more: Any
) -> VideoStage:
    """The stage that the shared settings describe; ``more`` is the method's own part, ``kind`` its own stage."""
    source, mixing = run.train_source(), config.mixing
    return kind(
        "videos",
        train=config.train,
        source=source,
        model=model,
        objective=config.objective,
        prompts=[] if config.objective == "captions" else class_prompt_lists(source, config.text),
        smoothing=config.smoothing,
        mixing=Mixing(mixing.mixup, mixing.cutmix, mixing.switch),
        **more,
    )


def frames_of_data(source: Source) -> int | None:
    """Frames per clip of a source; None when it has none to look at."""
    clip = getattr(source, "clip", None)
    if clip is not None:
        return int(clip.frames)
    for index in range(min(len(source), 1)):
        frames = source[index].extra.get("frames")
        return None if frames is None else len(frames)
    return None
