"""The exact k-th smallest magnitude of numbers that come in pieces, from two histograms of 65,536 bins.

The bits of non-negative fp32 numbers sort as integers do: the upper 16 bits choose a bin, a second look at the numbers
of that bin, by their lower 16 bits, finds the number itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 1 << 16
PIECE = 1 << 20
"""Numbers counted at a time: integers for counting take three times their memory."""


class OrderStatistic:
    """Call ``look`` on every piece, then ``aim``, then ``look_closer`` on every piece again, then read ``value``."""

    def __init__(self) -> None:
        self.total = 0
        self._high = torch.zeros(BINS, dtype=torch.int64)
        self._low = torch.zeros(BINS, dtype=torch.int64)
        self._bin = self._rank = -1

    def look(self, x: Tensor) -> None:
        """Count magnitudes of any shape by their upper bits."""
        self.total += x.numel()
        for bits in _bits(x):
            self._high += torch.bincount(bits >> 16, minlength=BINS)

    def aim(self, k: int) -> None:
        """Choose the k-th smallest, 1 <= k <= total."""
        if not 1 <= k <= self.total:
            raise ValueError(f"no {k}-th smallest of {self.total} numbers")
        below = self._high.cumsum(0)
        self._bin = int(torch.searchsorted(below, torch.tensor(k)))
        self._rank = k - (int(below[self._bin - 1]) if self._bin else 0)

    def look_closer(self, x: Tensor) -> None:
        """Count those of the chosen bin by their lower bits."""
        for bits in _bits(x):
            self._low += torch.bincount(bits[bits >> 16 == self._bin] & 0xFFFF, minlength=BINS)

    @property
    def value(self) -> float:
        """The k-th smallest magnitude, a number that occurs."""
        low = int(torch.searchsorted(self._low.cumsum(0), torch.tensor(self._rank)))
        return float(torch.tensor((self._bin << 16) | low, dtype=torch.int32).view(torch.float32))


def _bits(x: Tensor) -> list[Tensor]:
    flat = x.detach().abs().to(torch.float32).flatten()
    return [piece.view(torch.int32) for piece in flat.split(PIECE)]
