"""The pixels of one kind of part: anomalous scores in memory, normal ones in memory or in a temporary file.

Scores stay float32 as the detector gave them, so metrics are those of all pixels at once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np
from scipy import ndimage

from clipgraft_anomaly.metrics import (
    Floats,
    Ranking,
    aupro,
    aupro_legacy,
    auroc,
    average_precision,
    best_f1,
    counts_above,
    legacy_thresholds,
    ranking,
)

IN_MEMORY = 2**27
"""Normal scores, 512 MiB, that one kind of part keeps in memory; more go to a file."""
PART = 2**24
"""Scores that are sorted at a time."""
EIGHT = np.ones((3, 3), int)
"""Pixels that touch at a corner belong together."""


@dataclass(frozen=True, slots=True)
class PixelMetrics:
    """None where undefined: no anomalous pixel, or no normal one. ``f1_max`` is an oracle."""

    auroc: float | None = None
    ap: float | None = None
    f1_max: float | None = None
    aupro: float | None = None
    aupro_legacy: float | None = None


class Pixels:
    """Collects maps with their masks. ``regions``: 8-connected pieces of damage so far."""

    def __init__(self, *, in_memory: int = IN_MEMORY) -> None:
        self.regions, self.normal, self.in_memory = 0, 0, in_memory
        self._anomalous: list[Floats] = []
        self._weights: list[Floats] = []
        self._normal: list[Floats] = []
        self._held = 0
        self._file: IO[bytes] | None = None
        self._range = np.inf, -np.inf

    def add(self, scores: Floats, mask: np.ndarray) -> None:
        """A map (H, W') float32 and its mask (H, W') 0 or 1."""
        labels, count = ndimage.label(mask, structure=EIGHT)
        inside = labels > 0
        area = np.bincount(labels.ravel(), minlength=count + 1)
        self.regions += count
        self._anomalous.append(scores[inside])
        self._weights.append(1 / area[labels[inside]])
        normal = scores[~inside]
        self._normal.append(normal)
        self._held, self.normal = self._held + normal.size, self.normal + normal.size
        self._range = min(self._range[0], float(scores.min())), max(self._range[1], float(scores.max()))
        if self._held > self.in_memory:
            self._spill()

    def measure(self) -> tuple[PixelMetrics, Ranking]:
        """All metrics of what was added, and the counts they came from."""
        scores = np.concatenate([*self._anomalous, np.empty(0, np.float32)])
        weights = np.concatenate([*self._weights, np.empty(0)])
        distinct = np.unique(scores)[::-1]
        steps = _rounded_down(legacy_thresholds(*self._range)) if len(scores) else distinct
        above, reached = counts_above(self._sorted_parts(), np.concatenate([distinct, steps]))
        k = len(distinct)
        found = ranking(scores, weights, distinct, above[:k], reached[:k], normal=self.normal)
        if not found.defined:
            return PixelMetrics(), found
        higher = k - np.searchsorted(distinct[::-1], steps, side="right")
        overlap = np.concatenate([[0.0], found.overlap])[higher] / self.regions
        legacy = aupro_legacy(overlap, above[k:], normal=self.normal)
        return PixelMetrics(auroc(found), average_precision(found), best_f1(found)[0], aupro(found), legacy), found

    def _sorted_parts(self) -> Iterator[Floats]:
        """The normal scores, at most ``PART`` at a time."""
        if self._file is not None:
            self._file.seek(0)
            while len(part := np.fromfile(self._file, np.float32, PART)):
                part.sort()
                yield part
        if self._normal:
            whole = np.concatenate(self._normal)
            for start in range(0, len(whole), PART):
                yield np.sort(whole[start : start + PART])

    def _spill(self) -> None:
        """Move the normal scores to the file."""
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this object
        self._file.seek(0, 2)
        for part in self._normal:
            part.tofile(self._file)
        self._normal, self._held = [], 0


def _rounded_down(thresholds: Floats) -> Floats:
    """The largest float32 not above each; a float32 score exceeds one exactly when it exceeds the other."""
    near = thresholds.astype(np.float32)
    return np.where(near > thresholds, np.nextafter(near, np.float32(-np.inf)), near).astype(np.float32)
