"""Mean and covariance of a teacher's features, one batch after the other, in double precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """``count`` rows, their ``mean`` (D,) and ``scatter`` (D, D), the sum of outer products about the mean; float64."""

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, width: int) -> Moments:
        """Of nothing yet."""
        return cls(0, torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64))

    def update(self, rows: Tensor) -> None:
        """Take up (..., D)."""
        x = rows.detach().reshape(-1, rows.shape[-1]).double().cpu()
        if not len(x):
            return
        mean = x.mean(0)
        self._join(len(x), mean, (x - mean).T @ (x - mean))

    def join(self, other: Moments) -> None:
        """Take up what another process saw."""
        self._join(other.count, other.mean, other.scatter)

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        """Chan, Golub, LeVeque 1979: no cancellation, whatever the mean is."""
        total = self.count + count
        if not total:
            return
        delta = mean - self.mean
        self.scatter += scatter + torch.outer(delta, delta) * (self.count * count / total)
        self.mean += delta * (count / total)
        self.count = total

    def covariance(self) -> Tensor:
        """(D, D), of the population."""
        return self.scatter / max(self.count, 1)


def joined(parts: Sequence[Moments]) -> Moments:
    """The moments of all rows of all parts."""
    found = Moments.of(len(parts[0].mean))
    for part in parts:
        found.join(part)
    return found
