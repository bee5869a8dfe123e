"""Numbers about a path: its barrier, the blocks that hold it up, and rank correlation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def barrier(alphas: Sequence[float], losses: Sequence[float]) -> float:
    """max over interior a of L(a) - ((1 - a) L(0) + a L(1)); both ends must be among ``alphas``.

    Above 0 a point between is worse than the straight line between the ends; a convex loss has none. For a score s of
    which more is better, L = -s.
    """
    if len(alphas) != len(losses) or 0 not in alphas or 1 not in alphas:
        raise ValueError("a barrier needs a loss per alpha, and both ends, 0 and 1")
    start, end = losses[list(alphas).index(0)], losses[list(alphas).index(1)]
    inner = [loss - (start + a * (end - start)) for a, loss in zip(alphas, losses, strict=True) if 0 < a < 1]
    return max(inner, default=0.0)


def stragglers(barriers: Mapping[str, float], count: int) -> list[str]:
    """The ``count`` blocks with the highest barriers of their own paths, highest first; ties in the order given.

    Ours: the paper's definition was not public.
    """
    return sorted(barriers, key=lambda name: -barriers[name])[:count]


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation, ties with their mean rank; not a number when either is constant."""
    a, b = _ranks(x), _ranks(y)
    mean = (len(a) - 1) / 2
    top = sum((p - mean) * (q - mean) for p, q in zip(a, b, strict=True))
    bottom = (sum((p - mean) ** 2 for p in a) * sum((q - mean) ** 2 for q in b)) ** 0.5
    return top / bottom if bottom else float("nan")


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(values)
    return [order.index(v) + (order.count(v) - 1) / 2 for v in values]
