"""Measuring a video model: classification with several views, retrieval in both directions, exact over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from clipgraft.data.base import Sample, Source
from clipgraft.data.loader import BadSamples, class_prompts
from clipgraft.distributed import rank, to_all, world_size
from clipgraft.errors import InputError
from clipgraft.evaluation.base import Evaluation
from clipgraft.evaluation.progress import LateBar
from clipgraft.evaluation.sharding import all_rows, together
from clipgraft.evaluation.statistics import Share
from clipgraft.log import RunLog
from clipgraft_video.model import VideoModel
from clipgraft_video.reading import Clips, clip_batches


@dataclass
class Seen:
    """Rows of all ranks in source order: ``samples`` and what was computed of each, (n, ...)."""

    samples: list[Sample]
    rows: Tensor
    bad: BadSamples = field(default_factory=lambda: BadSamples(0))


@dataclass(frozen=True)
class Views:
    """Deterministic views of a test: ``temporal`` times ``crops``."""

    temporal: int = 1
    crops: Literal[1, 3] = 1

    def each(self, source: Source) -> list[Clips]:
        """One reader per view, crops first, as the papers order them."""
        return [
            Clips(source, view=view, views=self.temporal, crop=crop, crops=self.crops)
            for crop in range(self.crops)
            for view in range(self.temporal)
        ]


def prompts_of(source: Source, templates: Sequence[str], classes: Sequence[str] = ()) -> list[list[str]]:
    """Texts of every class; without templates those of the source, and without these the bare names."""
    names = list(classes or source.classes)
    if len(names) < 2:
        raise InputError(f"{source.name} names {len(names)} classes; classification needs two or more")
    return [list(class_prompts(name, templates or source.templates or ("{}",))) for name in names]


@torch.no_grad()
def class_texts(model: VideoModel, prompts: Sequence[Sequence[str]]) -> Tensor:
    """(K, D) as the head wants them: the mean of a class's unit texts, of length one; or the mean of raw texts."""
    raw, flat = model.pooling.raw_texts, [text for texts in prompts for text in texts]
    rows = torch.split(model.texts(flat, raw=raw), [len(texts) for texts in prompts])
    mean = torch.stack([row.mean(0) for row in rows])
    return mean if raw else torch.nn.functional.normalize(mean, dim=-1)


def look(
    model: VideoModel,
    clips: Clips,
    texts: Tensor | None,
    *,
    batch_size: int,
    workers: int | None = None,
    log: RunLog | None = None,
    title: str = "videos",
) -> Seen:
    """Every video once: probabilities (n, K) for ``texts`` (K, D), or unit embeddings (n, D) without texts."""
    device, was = next(model.parameters()).device, model.training
    model.eval()

    def share() -> Seen:
        found, rows, bad = list[Sample](), list[Tensor](), BadSamples(len(clips))
        batches = clip_batches(clips, batch_size=batch_size, bad=bad, workers=workers, rank=rank(), world=world_size())
        with LateBar(log, title, len(clips) // world_size()) as bar, torch.no_grad():
            for samples, frames in batches:
                video = model(frames.to(device))
                row = video.unit() if texts is None else model.logits(video, texts.to(device)).softmax(-1)
                rows.append(row.float().cpu())
                found += samples
                bar.advance(len(samples))
        return Seen(found, torch.cat(rows) if rows else torch.empty(0), bad)

    try:
        own = together(share)
    finally:
        model.train(was)
    rows = all_rows(own.rows if own.samples else None)
    everyone = to_all((own.samples, own.bad))
    bad = BadSamples(len(clips), set[int]().union(*(b.indices for _, b in everyone)))
    bad.first = [line for _, b in everyone for line in b.first][:10]
    if rows is None:
        raise InputError(f"{clips.name} has nothing that can be read: {bad}")
    if bad.count and log is not None:
        log.info(f"{clips.name}: {bad}; skipped")
    return Seen([sample for samples, _ in everyone for sample in samples], rows, bad)


def classify(
    model: VideoModel,
    source: Source,
    *,
    templates: Sequence[str] = (),
    views: Views | None = None,
    batch_size: int = 8,
    workers: int | None = None,
    log: RunLog | None = None,
) -> Evaluation:
    """Top-1 and, from five classes on, top-5; a tie is wrong. Records: id, label, prediction, top1, top5.

    Scores of several views are means of their softmax. A video that one view can't read is left out of all.
    """
    texts = class_texts(model, prompts_of(source, templates))
    seen = [
        look(model, clips, texts, batch_size=batch_size, workers=workers, log=log, title=f"classifying {source.name}")
        for clips in (views or Views()).each(source)
    ]
    samples, scores = _in_all(seen)
    if bare := next((sample.id for sample in samples if sample.label is None), None):
        raise InputError(f"{source.name}: {bare} has no label; give a list with labels, or folders of classes")
    labels = torch.tensor([sample.label for sample in samples])
    places = (~(scores < scores.gather(1, labels[:, None]))).sum(1) - 1  # what isn't worse counts against it
    counts = {f"top{k}": (int((places < k).sum()), len(places)) for k in (1, 5) if scores.shape[1] >= k}
    records = tuple(
        {"id": s.id, "label": label, "prediction": p, **{name: place < int(name[3:]) for name in counts}}
        for s, label, p, place in zip(samples, labels.tolist(), scores.argmax(1).tolist(), places.tolist(), strict=True)
    )
    statistics = {name: Share(name) for name in counts} | {"mean_per_class": Share("top1", groups="label")}
    right = labels[places == 0].bincount(minlength=scores.shape[1]).double()
    shown = labels.bincount(minlength=scores.shape[1])
    metrics = {name: hits / total for name, (hits, total) in counts.items()}
    metrics["mean_per_class"] = float((right[shown > 0] / shown[shown > 0]).mean())
    if seen[0].bad.count:
        metrics["skipped"] = float(seen[0].bad.count)
    return Evaluation(metrics, counts, records, statistics)


def _in_all(seen: Sequence[Seen]) -> tuple[list[Sample], Tensor]:
    """What every view could read, and the mean of their rows."""
    everywhere = set[str].intersection(*({sample.id for sample in one.samples} for one in seen))
    kept = [[k for k, sample in enumerate(one.samples) if sample.id in everywhere] for one in seen]
    rows = torch.stack([one.rows[places] for one, places in zip(seen, kept, strict=True)]).mean(0)
    return [seen[0].samples[k] for k in kept[0]], rows


class _Given:
    """Embeddings under the names by which the core's retrieval asks for features."""

    def __init__(self, seen: Seen, model: VideoModel) -> None:
        self._seen, self._model = seen, model

    def samples(self, source: Source) -> list[Sample]:
        """Of the videos."""
        return self._seen.samples

    def images(self, source: Source) -> Tensor:
        """(n, D) of the videos."""
        return self._seen.rows

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """(n, D) of captions."""
        return self._model.texts(list(texts)).float().cpu()


def retrieve(
    model: VideoModel,
    source: Source,
    *,
    batch_size: int = 8,
    workers: int | None = None,
    log: RunLog | None = None,
) -> Evaluation:
    """Recall at 1, 5 and 10 of text to video and video to text, median and mean rank, and their sum.

    A rank counts every wrong candidate that is at least as good, so ties count against the model, once. A video's rank
    is that of its best caption.
    """
    from clipgraft.evaluation.retrieval import Retrieval

    seen = look(
        model, Clips(source), None, batch_size=batch_size, workers=workers, log=log, title=f"embedding {source.name}"
    )
    found = Retrieval()(_Given(seen, model), source)  # type: ignore[arg-type]

    def named(name: str) -> str:
        return name.replace("image_to_text", "video_to_text").replace("text_to_image", "text_to_video")

    metrics = {named(k): v for k, v in found.metrics.items()}
    records = [{named(k).replace("image", "video"): v for k, v in row.items()} for row in found.samples]
    by_text = torch.tensor([place for row in found.samples for place in row["image_ranks"]]).double() + 1
    by_video = torch.tensor([row["caption_rank"] for row in found.samples]).double() + 1
    for name, places in (("text_to_video", by_text), ("video_to_text", by_video)):
        metrics[f"{name}_median_rank"] = float(places.quantile(0.5))
        metrics[f"{name}_mean_rank"] = float(places.mean())
    metrics["recall_sum"] = sum(v for k, v in metrics.items() if "_r" in k and k.rpartition("_r")[2].isdigit())
    statistics = {
        named(name): Share(named(share.hits), of=share.of)
        for name, share in found.statistics.items()
        if isinstance(share, Share)
    }
    lower = frozenset(name for name in metrics if name.endswith("_rank"))
    counts = {named(k): v for k, v in found.counts.items()}
    return Evaluation(metrics, counts, tuple(records), statistics, lower=lower)
