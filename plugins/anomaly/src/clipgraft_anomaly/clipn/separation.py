"""How well a score tells known pictures from unknown ones, as a function of one record per picture.

n records, b draws of them, G distinct scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clipgraft.evaluation.statistics import Bound, Records

RECALL = 0.95
"""Share of known pictures that the threshold of FPR95 has to accept."""


@dataclass(frozen=True, slots=True)
class Separated:
    """AUROC (the chance that a known picture scores above an unknown one, ties counting half) or FPR95 (the share of

    unknown ones accepted at the highest threshold that accepts 95 % of the known; equal scores go together) of the
    column ``score`` against ``known``. NaN where a draw holds one kind only.
    """

    metric: Literal["auroc", "fpr95"]
    score: str = "score"

    def bind(self, samples: Records) -> Bound:
        """Rank the scores, from the highest."""
        scores = torch.tensor([float(row[self.score]) for row in samples], dtype=torch.float64)
        known = torch.tensor([bool(row["known"]) for row in samples])
        levels, level = torch.unique(-scores, return_inverse=True)

        def bound(weights: Tensor) -> Tensor:
            right, wrong = (
                weights.new_zeros(len(weights), len(levels)).index_add_(1, level, weights * side)
                for side in (known, ~known)
            )  # (b, G) each
            accepted, let_in = right.cumsum(1), wrong.cumsum(1)
            all_known, all_unknown = accepted[:, -1], let_in[:, -1]
            if self.metric == "auroc":
                value = (wrong * (accepted - right / 2)).sum(1) / (all_known * all_unknown)
            else:
                enough = accepted >= RECALL * all_known[:, None] * (1 - 1e-12)
                value = let_in.gather(1, enough.int().argmax(1, keepdim=True))[:, 0] / all_unknown
            return torch.where((all_known > 0) & (all_unknown > 0), value, torch.nan)

        return bound
