"""The right caption among wrong ones, as ARO and SugarCrepe measure it (arXiv 2210.01936, 2306.14610)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from clipgraft.config.schema import Config
from clipgraft.data.base import Sample, Source
from clipgraft.errors import InputError
from clipgraft.evaluation.base import Evaluation, Features
from clipgraft.evaluation.statistics import Share

CHUNK = 2**16
"""Captions scored at a time."""


class HardNegatives(Config):
    """Share of images that are closer to their caption than to every wrong one; of several captions each has to be.

    A tie is wrong, and the share of ties is reported: an encoder that is blind to the order of words makes many.
    """

    lower_is_better: ClassVar[frozenset[str]] = frozenset({"ties"})
    min_group: int | None = Field(
        None,
        gt=0,
        description="groups of fewer samples have no metric and don't count in macro; null: as the benchmark has it",
    )

    def __call__(self, features: Features, source: Source) -> Evaluation:
        """accuracy over samples, macro (mean over groups), ties, group/NAME. Records: id, group, correct, tie, margin.

        In the records ``counted`` is ``correct`` where the sample counts in macro, and ``macro_group`` its group there.
        """
        samples = features.samples(source)
        if bare := [s.id for s in samples if not s.captions or not s.negatives]:
            raise InputError(
                f"{source.name}: {bare[0]} has no caption together with wrong ones; use aro:DIR, sugarcrepe:DIR or "
                "another source whose samples have negatives"
            )
        margins = _margins(samples, features, features.images(source)).tolist()
        sizes = Counter(sample.group for sample in samples)
        least = self.min_group or int(getattr(source, "smallest", 1))
        shown = [group for group in sizes if group and sizes[group] >= least]
        counted = {group for group in shown if group not in getattr(source, "unfit", ())}
        if self.min_group and any(sizes) and not counted:
            raise InputError(f"{source.name} has no group of {least} samples or more; set min_group lower")
        records = []
        for sample, margin in zip(samples, margins, strict=True):
            row = {"id": sample.id, "group": sample.group, "correct": margin > 0, "tie": margin == 0, "margin": margin}
            if counted:
                inside = sample.group in counted
                row |= {"macro_group": sample.group if inside else "", "counted": margin > 0 if inside else None}
            records.append(row)
        counts = {"accuracy": (sum(row["correct"] for row in records), len(records))}
        counts["ties"] = sum(row["tie"] for row in records), len(records)
        right = Counter(row["group"] for row in records if row["correct"])
        counts |= {f"group/{group}": (right[group], sizes[group]) for group in shown}
        metrics = {name: hits / total for name, (hits, total) in counts.items()}
        statistics = {"accuracy": Share("correct"), "ties": Share("tie")}
        statistics |= {f"group/{group}": Share("correct", where=("group", group)) for group in shown}
        if counted:
            metrics["macro"] = sum(metrics[f"group/{group}"] for group in counted) / len(counted)
            statistics["macro"] = Share("counted", groups="macro_group")
        return Evaluation(metrics, counts, tuple(records), statistics)


def _margins(samples: Sequence[Sample], features: Features, images: Tensor) -> Tensor:
    """(n,) float64: cosine of the worst caption minus that of the best wrong one; images (n, D)."""
    offered = [(*sample.captions, *sample.negatives) for sample in samples]
    owner = torch.tensor([k for k, texts in enumerate(offered) for _ in texts])
    sizes = [(len(sample.captions), len(sample.negatives)) for sample in samples]
    wrong = torch.tensor([flag for right, others in sizes for flag in [False] * right + [True] * others])
    row = {text: k for k, text in enumerate(dict.fromkeys(text for texts in offered for text in texts))}
    column, embedded = torch.tensor([row[text] for texts in offered for text in texts]), features.texts(list(row))
    # one product and one sum per row: equal rows have equal scores, to the last bit
    scores = torch.cat(
        [
            (images[owner[part]].double() * embedded[column[part]].double()).sum(-1)
            for part in torch.split(torch.arange(len(owner)), CHUNK)
        ]
    )
    worst = torch.full((len(samples),), torch.inf, dtype=torch.float64)
    best = (-worst).scatter_reduce(0, owner[wrong], scores[wrong], "amax")
    return worst.scatter_reduce(0, owner[~wrong], scores[~wrong], "amin").sub(best)
