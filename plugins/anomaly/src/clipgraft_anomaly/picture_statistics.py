"""How the metrics of whole pictures follow from one record per picture, for intervals and paired tests.

n records, b draws of them, K distinct scores of one kind of part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clipgraft.evaluation.statistics import Bound, Records

PictureMetric = Literal["image_auroc", "image_ap", "image_f1_max"]


@dataclass(frozen=True, slots=True)
class Pictures:
    """Mean over the values of the column ``object`` of a metric of ``score`` against ``label``.

    Parts of which a draw holds one side alone are left out; NaN when that is all of them.
    """

    metric: PictureMetric

    def bind(self, samples: Records) -> Bound:
        """Sort every part's scores."""
        rows: dict[str, list[int]] = {}
        for k, sample in enumerate(samples):
            rows.setdefault(sample["object"], []).append(k)
        scores = torch.tensor([float(sample["score"]) for sample in samples], dtype=torch.float64)
        labels = torch.tensor([bool(sample["label"]) for sample in samples])
        parts = [torch.tensor(places) for places in rows.values()]

        def bound(weights: Tensor) -> Tensor:
            found = [self._part(weights[:, part], scores[part], labels[part]) for part in parts]
            return torch.stack(found, 1).nanmean(1)

        return bound

    def _part(self, weights: Tensor, scores: Tensor, label: Tensor) -> Tensor:
        """Weights (b, m), scores and labels (m,) -> (b,)."""
        levels, level = torch.unique(scores, return_inverse=True)
        level = len(levels) - 1 - level  # from the highest score on
        hits, misses = (
            weights.new_zeros(len(weights), len(levels)).index_add_(1, level, weights * side)
            for side in (label, ~label)
        )
        found, wrong = hits.cumsum(1), misses.cumsum(1)
        anomalous, normal = found[:, -1:], wrong[:, -1:]
        if self.metric == "image_auroc":
            value = (hits * (normal - wrong + misses / 2)).sum(1) / (anomalous * normal)[:, 0]
        elif self.metric == "image_ap":
            value = torch.where(hits > 0, hits * found / (found + wrong), 0.0).sum(1) / anomalous[:, 0]
        else:
            value = (2 * found / (found + wrong + anomalous)).amax(1)
        return torch.where(((anomalous > 0) & (normal > 0))[:, 0], value, torch.nan)
