"""Film strips for the page of a run: what the trained model says as a video goes on, below its frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clipgraft.data.base import BadSample, Sample, Source, entry_of
from clipgraft.errors import ClipgraftError
from clipgraft.reporting import Figure, Picture, Section, encoded
from clipgraft_video.evaluate import class_texts, prompts_of
from clipgraft_video.evaluator import videos_of
from clipgraft_video.heads import Mean, VideoFeatures
from clipgraft_video.model import VideoModel, open_video_model
from clipgraft_video.reading import Clips

if TYPE_CHECKING:
    from clipgraft.registry import Registry
    from clipgraft.rundir import RunRecord

STRIPS, MOMENTS, CAPTIONS = 6, 8, 64
"""Videos on the page, frames of each, and captions among which one is looked for."""
AT_ONCE, SIDE = 2, 128
"""Videos per forward pass; longest side of a frame on the page [pixels]."""

STANDS_STILL = (
    "Below a frame: what the trained model says when the video has come so far and then stands still, so that it "
    "always sees as many frames as it was trained for."
)


def film_strips(run: RunRecord, *, registry: Registry) -> list[Section]:
    """The predicted class, or the rank of the video's own caption, over time; nothing for runs without videos."""
    classified, retrieved = run.measured("video/classification"), run.measured("video/text-retrieval")
    if not classified and not retrieved:
        return []
    source, model = opened(run, (classified or retrieved)[0], registry=registry)
    if classified:
        return [_classes(run, classified[0], source, model)]
    return [_captions(run, retrieved[0], source, model)]


def opened(run: RunRecord, evaluator: str, *, registry: Registry) -> tuple[Source, VideoModel]:
    """The data that an evaluator measured on, and the run's export with the head that it was measured with."""
    from clipgraft.data import open_source

    reference = run.data_of(evaluator)
    if run.export is None or reference is None:
        raise ClipgraftError("this run wrote no export" if run.export is None else f"{evaluator} names no data")
    pool = run.node(evaluator).get("pool")
    model = open_video_model(str(run.path), registry=registry, head=Mean(pool) if pool else None)
    return videos_of(open_source(reference, registry=registry)), model


def _classes(run: RunRecord, evaluator: str, source: Source, model: VideoModel) -> Section:
    before = {str(row["id"]): row for row in run.samples("before", evaluator)}
    after = {str(row["id"]): row for row in run.samples("after", evaluator)}
    names, figures = source.classes, list[Figure]()
    texts = class_texts(model, prompts_of(source, tuple(run.node(evaluator).get("templates") or ())))
    for sample in videos(source, chosen(before, after, most=STRIPS), list(after)):
        label, pictures = int(sample.label or 0), list[Picture]()
        moments, rows = over_time(model, sample.image, lambda video: model.logits(video, texts).softmax(-1))
        for t, row in zip(moments, rows, strict=True):
            best = int(row.argmax())
            told = f"{names[best]} {float(row[best]):.2f}".replace(" 0.", " .")
            pictures.append(_frame(sample, t, f"; the model says {told}", told, right=best == label))
        then = before.get(sample.id, {}).get("prediction")
        words = f"{sample.id}, {names[label]}."
        words += "" if then is None else f" Before the run the model said {names[int(then)]}."
        figures.append(Figure(tuple(pictures), words, across=MOMENTS))
    return Section(
        "Videos as they go on",
        f"{STANDS_STILL} The number is the probability of that class, the mark says whether it is the video's own. "
        "Videos that the training made right, made wrong or left as they were take turns.",
        tuple(figures),
    )


def _captions(run: RunRecord, evaluator: str, source: Source, model: VideoModel) -> Section:
    shown = range(0, len(source), max(1, len(source) // STRIPS))[:STRIPS]
    others = [caption for k in range(min(CAPTIONS, len(source))) for caption in entry_of(source, k).captions]
    figures = list[Figure]()
    for sample in videos(source, [entry_of(source, k).id for k in shown], []):
        if not sample.captions:
            continue
        captions = list(dict.fromkeys((*sample.captions, *others)))
        own = len(dict.fromkeys(sample.captions))
        with torch.no_grad():
            texts = model.texts(captions)
        moments, rows = over_time(model, sample.image, lambda video, texts=texts: video.unit() @ texts.T)
        pictures = []
        for t, row in zip(moments, rows, strict=True):
            rank = 1 + int((row[own:] >= row[:own].max()).sum())
            told = f"rank {rank} of {len(captions)}"
            pictures.append(_frame(sample, t, f"; its caption has {told}", told, right=rank == 1))
        figures.append(Figure(tuple(pictures), f"{sample.id}: {sample.captions[0]}", across=MOMENTS))
    return Section(
        "Videos as they go on",
        f"{STANDS_STILL} The rank is that of the video's own caption among those of {CAPTIONS} videos; the mark says "
        "whether it is the first.",
        tuple(figures),
    )


def _frame(sample: Sample, t: int, more: str, caption: str, *, right: bool) -> Picture:
    clip: Any = sample.image
    return Picture(
        encoded(clip[t], side=SIDE),
        f"frame {t + 1} of {len(clip)} of {sample.id}{more}",
        caption,
        "right" if right else "wrong",
    )


@torch.no_grad()
def over_time(model: VideoModel, clip: Any, score: Callable[[VideoFeatures], Tensor]) -> tuple[list[int], Tensor]:
    """Moments of a clip (T, 3, S, S), the last one its end, and then the scores (M, K) of what was seen so far."""
    frames = len(clip)
    count = min(frames, MOMENTS)
    moments = [round((k + 1) * frames / count) - 1 for k in range(count)]
    held = torch.stack([clip[[min(s, t) for s in range(frames)]] for t in moments])
    device = next(model.parameters()).device
    rows = [score(model(part.to(device))) for part in torch.split(held, AT_ONCE)]
    return moments, torch.cat(rows).float().cpu()


def chosen(before: Mapping[str, Any], after: Mapping[str, Any], *, most: int) -> list[str]:
    """Ids of records {id: row}: those made right, left wrong, made wrong and left right take turns, classes too."""
    groups: dict[tuple[bool, bool], list[str]] = {(False, True): [], (False, False): [], (True, False): []}
    groups[True, True] = []
    for name, row in after.items():
        groups[bool(before.get(name, {}).get("top1")), bool(row.get("top1"))].append(name)
    turns = [_classes_in_turn([(name, after[name].get("label")) for name in names]) for names in groups.values()]
    return [name for turn in zip_longest(*turns) for name in turn if name is not None][:most]


def _classes_in_turn(named: Sequence[tuple[str, Any]]) -> list[str]:
    by_class: dict[Any, list[str]] = {}
    for name, label in named:
        by_class.setdefault(label, []).append(name)
    return [name for turn in zip_longest(*by_class.values()) for name in turn if name is not None]


def videos(source: Source, names: Sequence[str], rows: Sequence[str]) -> Iterator[Sample]:
    """The videos of ``names`` with their frames as the image. ``rows`` are ids in source order, or nothing.

    The place in them is tried first; videos that couldn't be read shift it.
    """
    clips, places = Clips(source), {name: k for k, name in enumerate(rows)}
    known: dict[str, int] = {}
    for name in names:
        place = places.get(name)
        if place is None or place >= len(source) or entry_of(source, place).id != name:
            known = known or {entry_of(source, k).id: k for k in range(len(source))}
            place = known.get(name)
        if place is None:
            continue
        try:
            yield clips[place]
        except BadSample:
            continue
