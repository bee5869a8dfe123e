"""Intersection over union of label maps, from per-picture counts that intervals and paired tests can use.

Shape legend of this package: B pictures, H x W' pixels, h x w tokens with N = h * w, D joint space, K labels.

A label map holds 0 for background and 1 + class; ``IGNORE`` marks pixels that don't count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clipgraft.evaluation.base import Evaluation
from clipgraft.evaluation.statistics import Bound, Records, Share, Statistic

IGNORE = 255


@dataclass(frozen=True, slots=True)
class Counts:
    """Pixels of one picture per label: ``both`` found and true, ``found``, ``true``; each (K,) int64."""

    both: Tensor
    found: Tensor
    true: Tensor

    @property
    def union(self) -> Tensor:
        """(K,) pixels that are one or the other."""
        return self.found + self.true - self.both


def confusion(found: Tensor, truth: Tensor, *, labels: int) -> Tensor:
    """(K, K) int64 of two label maps (H, W'): rows are true, columns found; ``IGNORE`` in truth is left out."""
    seen = truth != IGNORE
    pairs = truth[seen].long() * labels + found[seen].long()
    return torch.bincount(pairs.flatten(), minlength=labels * labels).view(labels, labels)


def counts_of(matrix: Tensor) -> Counts:
    """From a confusion matrix (K, K)."""
    return Counts(matrix.diagonal().clone(), matrix.sum(0), matrix.sum(1))


def record(sample_id: str, counts: Counts) -> dict[str, Any]:
    """A picture as a row: ``pixels``, ``right``, ``iou`` (mean over its labels), and per label that occurs its

    ``both/k``, ``union/k`` and ``true/k``. Labels that neither occur nor were found have no columns.
    """
    union = counts.union
    here = union.nonzero()[:, 0].tolist()
    row: dict[str, Any] = {
        "id": sample_id,
        "pixels": int(counts.true.sum()),
        "right": int(counts.both.sum()),
        "iou": float((counts.both[here].double() / union[here]).mean()) if here else None,
    }
    for k in here:
        row |= {f"both/{k}": int(counts.both[k]), f"union/{k}": int(union[k])}
        if counts.true[k]:
            row[f"true/{k}"] = int(counts.true[k])
    return row


@dataclass(frozen=True, slots=True)
class MeanShare:
    """Mean over labels of a share of pixels summed over all pictures; labels without any pixel below are left out.

    ``below`` "union" makes it mIoU, "true" the mean accuracy of labels.
    """

    labels: tuple[int, ...]
    below: str = "union"

    def bind(self, samples: Records) -> Bound:
        """Dense columns (n, labels)."""

        def dense(column: str) -> Tensor:
            rows = [[float(row.get(f"{column}/{k}") or 0) for k in self.labels] for row in samples]
            return torch.tensor(rows, dtype=torch.float64).view(len(samples), len(self.labels))

        both, below = dense("both"), dense(self.below)
        return lambda weights: ((weights @ both) / (weights @ below)).nanmean(1)


def evaluation(
    rows: Sequence[Mapping[str, Any]], names: Mapping[int, str], *, per_class: bool, skipped: int = 0
) -> Evaluation:
    """``miou``, ``pixel_accuracy``, ``mean_accuracy``, ``picture_iou`` (mean over pictures), and perhaps iou/NAME.

    ``names`` are the labels that count. mIoU is that of the summed confusion matrix, as benchmarks state it.
    """
    labels = tuple(names)
    statistics: dict[str, Statistic] = {
        "miou": MeanShare(labels),
        "mean_accuracy": MeanShare(labels, below="true"),
        "pixel_accuracy": Share("right", of="pixels"),
        "picture_iou": Share("iou"),
    }
    if per_class:
        present = {int(key.removeprefix("union/")) for row in rows for key in row if key.startswith("union/")}
        statistics |= {f"iou/{name}": Share(f"both/{k}", of=f"union/{k}") for k, name in names.items() if k in present}
    once = torch.ones(1, len(rows), dtype=torch.float64)
    metrics = {name: float(statistic.bind(rows)(once)) for name, statistic in statistics.items()}
    if skipped:
        metrics["skipped"] = float(skipped)
    return Evaluation(metrics, samples=tuple(rows), statistics=statistics)
