"""``video/order``: whether a model reads the order of frames, by opposite classes and by frames in another order.

A class and its opposite, such as opening and closing something, hold the same frames in reverse; what is blind to order
can't tell them apart. n videos, K classes.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from pydantic import Field
from torch import Generator, Tensor

from clipgraft.config.schema import Config
from clipgraft.data.base import PairSource, Sample, Source
from clipgraft.errors import InputError, unknown_name
from clipgraft.evaluation.base import Evaluation
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.evaluation.statistics import Share
from clipgraft_video.evaluate import class_texts, look, prompts_of
from clipgraft_video.evaluator import model_of, videos_of
from clipgraft_video.heads import Pool
from clipgraft_video.reading import Clips

Way = Literal["forward", "reversed", "shuffled"]
WAYS: tuple[Way, ...] = get_args(Way)


class InOrder(Clips):
    """Clips with their frames as they are, from the last to the first, or in an order that is drawn by their number."""

    def __init__(self, source: Source, way: Way) -> None:
        super().__init__(source)
        self.way = way

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        frames = sample.image
        assert isinstance(frames, Tensor)
        if self.way == "forward":
            return sample
        if self.way == "reversed":
            places = torch.arange(len(frames)).flip(0)
        else:
            places = torch.randperm(len(frames), generator=Generator().manual_seed(index))
        return Sample(sample.id, frames[places], sample.captions, sample.label, attributes=sample.attributes)


def opposite_places(opposites: tuple[tuple[str, str], ...], classes: list[str]) -> Tensor:
    """(K,) number of each class's opposite, -1 where it has none."""
    places = torch.full((len(classes),), -1)
    if unknown := [name for pair in opposites for name in pair if name not in classes]:
        raise unknown_name("class", unknown[0], classes)
    for pair in opposites:
        for name, other in (pair, pair[::-1]):
            if name == other or places[classes.index(name)] >= 0:
                raise InputError(f"opposites: {name!r} needs one opposite, another class; write every pair once")
            places[classes.index(name)] = classes.index(other)
    return places


class Order(Config):
    """Classification forwards and with shuffled frames, and how often the right one of two opposites is preferred.

    ``direction``: the right class scores above its opposite (chance .5), and so ``shuffled_direction`` with frames in
    another order. ``reversed``: played backwards, the opposite is preferred. ``turned``: the preference changes when a
    video is played backwards, never for a model that is blind to order. A tie is wrong.
    """

    opposites: tuple[tuple[str, str], ...] = Field(
        min_length=1, description="pairs of class names that are each other's reverse, such as [opening, closing]"
    )
    templates: tuple[str, ...] = Field((), description="prompts with one {}; empty takes the data's, or bare names")
    pool: Pool | None = Field(None, description="mean over frames in this way, whatever head the model has")
    batch_size: int = Field(8, gt=0, description="videos per forward pass")

    def __call__(self, features: EncoderFeatures, source: Source | PairSource) -> Evaluation:
        """Records: id, label, top1, shuffled_top1, and direction, shuffled_direction, reversed, turned or None."""
        videos, model = videos_of(source), model_of(features, self.pool)
        opposite = opposite_places(self.opposites, list(videos.classes))
        texts = class_texts(model, prompts_of(videos, self.templates))
        found: dict[str, dict[str, Tensor]] = {way: {} for way in WAYS}
        labels: dict[str, int] = {}
        for way in WAYS:
            seen = look(
                model,
                InOrder(videos, way),
                texts,
                batch_size=self.batch_size,
                workers=features.workers,
                log=features.log,
                title=f"{videos.name}, {way}",
            )
            found[way] = {sample.id: row for sample, row in zip(seen.samples, seen.rows, strict=True)}
            labels |= {sample.id: -1 if sample.label is None else sample.label for sample in seen.samples}
        records = [
            _record(name, label, int(opposite[label]), *(found[way][name] for way in WAYS))
            for name, label in labels.items()
            if label >= 0 and all(name in found[way] for way in WAYS)
        ]
        if not any(row["direction"] is not None for row in records):
            raise InputError(f"{videos.name} has no video of a class that opposites name")
        columns = ("top1", "shuffled_top1", "direction", "shuffled_direction", "reversed", "turned")
        counted = {name: [bool(row[name]) for row in records if row[name] is not None] for name in columns}
        counts = {name: (sum(hits), len(hits)) for name, hits in counted.items()}
        metrics = {name: hits / total for name, (hits, total) in counts.items()}
        return Evaluation(metrics, counts, tuple(records), {name: Share(name) for name in columns})


def _record(
    name: str, label: int, opposite: int, forward: Tensor, backward: Tensor, shuffled: Tensor
) -> dict[str, object]:
    """From the scores (K,) of one video in three orders."""
    row: dict[str, object] = {"id": name, "label": label}
    for key, scores in (("top1", forward), ("shuffled_top1", shuffled)):
        row[key] = bool((scores >= scores[label]).sum() == 1)
    if opposite < 0:
        return row | dict.fromkeys(("direction", "shuffled_direction", "reversed", "turned"))
    ahead, back, mixed = (float(scores[label] - scores[opposite]) for scores in (forward, backward, shuffled))
    return row | {
        "direction": ahead > 0,
        "shuffled_direction": mixed > 0,
        "reversed": back < 0,
        "turned": (ahead > 0) != (back > 0),
    }
