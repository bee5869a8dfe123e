"""AUROC, average precision, F1 and per-region overlap from the same counts, exact, without sorting what is normal.

A anomalous and N normal scores (of pictures or of pixels), K distinct anomalous ones. Between two neighbouring
anomalous scores a ROC or PRO curve only runs level, so the counts at those K scores say everything about it; equal
scores are passed together. Normal scores may come in parts that are never in memory at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Counts = NDArray[np.int64]
PRO_LIMIT = 0.3
"""False positive rate up to which the PRO curve is integrated."""
LEGACY_STEPS = 200
POINTS = 400
"""Points of a curve that are kept for a picture of it."""


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """Counts at every distinct anomalous score, from the highest: ``threshold``, ``hits``, ``overlap``, ``above`` and

    ``reached`` are (K,). ``hits``: anomalous scores at or above it; ``overlap``: their summed weights, which end at
    ``regions`` for weights of one over the region's area; ``above`` and ``reached``: normal scores over it, and not
    below it.
    """

    threshold: Floats
    hits: Counts
    overlap: Floats
    above: Counts
    reached: Counts
    normal: int
    regions: float

    @property
    def anomalous(self) -> int:
        """A."""
        return int(self.hits[-1]) if len(self.hits) else 0

    @property
    def defined(self) -> bool:
        """Whether there are scores of both kinds."""
        return self.anomalous > 0 and self.normal > 0


def rank(anomalous: Floats, normal: Floats, *, weights: Floats | None = None) -> Ranking:
    """Scores (A,) and (N,), and maybe weights (A,) of the anomalous ones."""
    threshold = np.unique(anomalous)[::-1]
    above, reached = counts_above([np.sort(normal)], threshold)
    return ranking(anomalous, weights, threshold, above, reached, normal=len(normal))


def ranking(
    anomalous: Floats, weights: Floats | None, threshold: Floats, above: Counts, reached: Counts, *, normal: int
) -> Ranking:
    """From scores (A,), their distinct values from the highest (K,), and the normal counts at those."""
    place = len(threshold) - 1 - np.searchsorted(threshold[::-1], anomalous)
    hits = np.cumsum(np.bincount(place, minlength=len(threshold)), dtype=np.int64)
    overlap = hits.astype(np.float64)
    if weights is not None:
        overlap = np.cumsum(np.bincount(place, weights=weights, minlength=len(threshold)))
    return Ranking(threshold, hits, overlap, above, reached, normal, float(overlap[-1]) if len(overlap) else 0.0)


def counts_above(parts: Iterable[Floats], thresholds: Floats) -> tuple[Counts, Counts]:
    """How many scores lie above each threshold, and how many not below it; ``parts`` are sorted."""
    above, reached = np.zeros(len(thresholds), np.int64), np.zeros(len(thresholds), np.int64)
    for part in parts:
        at = thresholds.astype(part.dtype, copy=False)  # exact: they are scores, or rounded down to such
        above += len(part) - np.searchsorted(part, at, side="right")
        reached += len(part) - np.searchsorted(part, at, side="left")
    return above, reached


def auroc(r: Ranking) -> float | None:
    """Chance that an anomalous score is above a normal one, ties counting half; None without both kinds."""
    if not r.defined:
        return None
    below = r.normal - (r.above + r.reached) / 2
    return float((np.diff(r.hits, prepend=0) * below).sum() / (r.anomalous * r.normal))


def average_precision(r: Ranking) -> float | None:
    """Mean over recall steps of the precision at them, without interpolation; None without both kinds."""
    if not r.defined:
        return None
    return float((np.diff(r.hits, prepend=0) * (r.hits / (r.hits + r.reached))).sum() / r.anomalous)


def best_f1(r: Ranking) -> tuple[float | None, float | None]:
    """The largest F1 of any threshold, and that threshold (scores not below it are anomalous).

    It is chosen on the data that it is measured on: an oracle, and no promise.
    """
    if not r.defined:
        return None, None
    f1 = 2 * r.hits / (r.hits + r.reached + r.anomalous)
    best = int(f1.argmax())
    return float(f1[best]), float(r.threshold[best])


def curve(r: Ranking, *, regions: bool = False) -> tuple[Floats, Floats]:
    """All corners of the ROC curve, or with ``regions`` of the PRO curve, (2 K + 2,) from (0, 0) to (1, 1)."""
    y = r.overlap / r.regions if regions else r.hits / r.anomalous
    x = np.stack([r.above, r.reached], 1).ravel() / r.normal
    y = np.stack([np.concatenate([[0.0], y[:-1]]), y], 1).ravel()
    return np.concatenate([[0.0], x, [1.0]]), np.concatenate([[0.0], y, [1.0]])


def aupro(r: Ranking, *, limit: float = PRO_LIMIT) -> float | None:
    """Area below the PRO curve up to a false positive rate of ``limit``, over ``limit``; None without both kinds.

    PRO is the mean over regions of the share that is found (Bergmann et al. 2021); the curve is cut by linear
    interpolation.
    """
    if not r.defined:
        return None
    x, y = curve(r, regions=True)
    end = int(np.searchsorted(x, limit, side="left"))  # the first corner not left of the limit; x[0] = 0
    slope = (y[end] - y[end - 1]) / (x[end] - x[end - 1])
    x = np.concatenate([x[:end], [limit]])
    y = np.concatenate([y[:end], [y[end - 1] + slope * (limit - x[end - 1])]])
    return float(np.trapezoid(y, x) / limit)


def legacy_thresholds(low: float, high: float) -> Floats:
    """The 200 of the official code, equally far apart from the lowest score of all on, the highest left out."""
    return low + np.arange(LEGACY_STEPS) * ((high - low) / LEGACY_STEPS)


def aupro_legacy(overlap: Floats, above: Counts, *, normal: int, limit: float = PRO_LIMIT) -> float | None:
    """AUPRO as official code has it, from PRO (T,) and normal pixels above (T,) at ascending thresholds.

    Points of a false positive rate below ``limit`` are kept, and that axis is stretched to [0, 1]; nothing is
    interpolated. None where this isn't defined: fewer than two such rates, as with maps of few distinct values.
    """
    rate = above / max(normal, 1)
    kept = np.flatnonzero(rate < limit)[::-1]  # from the highest threshold, so that rates ascend
    x, y = rate[kept], overlap[kept]
    if not len(x) or x[0] == x[-1]:
        return None
    return float(np.trapezoid(y, (x - x[0]) / (x[-1] - x[0])))


def thinned(x: Floats, y: Floats, *, points: int = POINTS) -> tuple[list[float], list[float]]:
    """At most so many corners of a curve, equally far apart along it, with its ends."""
    way = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y)))])
    keep = np.unique(np.searchsorted(way, np.linspace(0, way[-1], points)).clip(0, len(x) - 1))
    keep = np.unique(np.concatenate([[0], keep, [len(x) - 1]])) if len(x) > points else np.arange(len(x))
    return [round(float(v), 6) for v in x[keep]], [round(float(v), 6) for v in y[keep]]
