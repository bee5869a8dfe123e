"""How sure a metric is, and whether two models differ: bootstrap intervals and paired tests over the same samples.

b draws, n samples. A statistic is computed from how often each sample was drawn, so that intervals, differences and
the metric itself (every sample once) are one formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from clipgraft.errors import ClipgraftError

Records = Sequence[Mapping[str, Any]]
Bound = Callable[[Tensor], Tensor]
"""How often each sample was drawn (b, n) float64 -> the metric (b,) float64, NaN where a draw leaves it undefined."""

DRAWS = 1000
CHUNK = 2**23
"""Numbers of samples held at a time while drawing."""


class Statistic(Protocol):
    """A metric as a function of the records of its evaluation."""

    def bind(self, samples: Records) -> Bound:
        """Read the columns that it needs, once."""


@dataclass(frozen=True, slots=True)
class Share:
    """Sum of the column ``hits`` over the sum of the column ``of`` (the number of samples without it).

    ``groups`` names a column: the mean over its values of each value's share; values that aren't drawn are left out.
    ``where`` = (column, value) looks only at the samples with that value. A sample without the column is left out.
    """

    hits: str
    of: str | None = None
    groups: str | None = None
    where: tuple[str, Any] | None = None

    def bind(self, samples: Records) -> Bound:
        """Tensors of the columns."""
        used = [self.where is None or row.get(self.where[0]) == self.where[1] for row in samples]
        used = [u and row.get(self.hits) is not None for u, row in zip(used, samples, strict=True)]
        hits = _column([row[self.hits] if u else 0 for u, row in zip(used, samples, strict=True)])
        of = _column([(row[self.of] if self.of else 1) if u else 0 for u, row in zip(used, samples, strict=True)])
        if self.groups is None:
            return lambda weights: (weights @ hits) / (weights @ of)
        values = {value: k for k, value in enumerate(dict.fromkeys(row[self.groups] for row in samples))}
        member = torch.zeros(len(samples), len(values), dtype=torch.float64)
        member[range(len(samples)), [values[row[self.groups]] for row in samples]] = 1
        return lambda weights: ((weights @ (hits[:, None] * member)) / (weights @ (of[:, None] * member))).nanmean(1)

    @property
    def binary(self) -> bool:
        """Whether each sample counts once, so that hits of two models form McNemar's table if they are 0 or 1."""
        return self.of is None and self.groups is None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types, without what isn't set."""
        given = {"hits": self.hits, "of": self.of, "groups": self.groups, "where": self.where}
        return {key: list(v) if isinstance(v, tuple) else v for key, v in given.items() if v is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Share:
        """The inverse of ``as_dict``."""
        where = data.get("where")
        return cls(data["hits"], data.get("of"), data.get("groups"), None if where is None else (where[0], where[1]))


@dataclass(frozen=True, slots=True)
class Difference:
    """``value`` = second minus first, its 95 % bootstrap interval, the two-sided p-value and the test's name."""

    value: float
    low: float
    high: float
    p_value: float
    test: str


def value(statistic: Statistic, samples: Records) -> float:
    """The metric itself: every sample once."""
    return float(statistic.bind(samples)(torch.ones(1, len(samples), dtype=torch.float64)))


def intervals(
    statistics: Mapping[str, Statistic], samples: Records, *, draws: int = DRAWS, level: float = 0.95, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap over samples (Efron 1979): {metric: (low, high)}; the draws are shared by all metrics."""
    bound = {name: statistic.bind(samples) for name, statistic in statistics.items()}
    found: dict[str, list[Tensor]] = {name: [] for name in bound}
    for weights in _draws(len(samples), draws, seed):
        for name, statistic in bound.items():
            found[name].append(statistic(weights))
    return {name: _range(torch.cat(values), level) for name, values in found.items()}


def difference(
    first: tuple[Statistic, Records], second: tuple[Statistic, Records], *, draws: int = DRAWS, seed: int = 0
) -> Difference:
    """Paired by the records' ``id``: McNemar's exact test where both count right answers, else the paired bootstrap.

    Samples that only one side has are left out; ``ClipgraftError`` when none is shared.
    """
    (one, rows), (two, others) = first, second
    return differences(({"": one}, rows), ({"": two}, others), draws=draws, seed=seed)[""]


def differences(
    first: tuple[Mapping[str, Statistic], Records],
    second: tuple[Mapping[str, Statistic], Records],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Difference]:
    """As ``difference`` for the metrics that both sides have, all from the same draws."""
    rows, others = paired(first[1], second[1])
    both = {name: (one, second[0][name]) for name, one in first[0].items() if name in second[0]}
    bound = {name: (one.bind(rows), two.bind(others)) for name, (one, two) in both.items()}
    drawn: dict[str, list[Tensor]] = {name: [] for name in both}
    for weights in _draws(len(rows), draws, seed):
        for name, (f, g) in bound.items():
            drawn[name].append(g(weights) - f(weights))
    once, found = torch.ones(1, len(rows), dtype=torch.float64), {}
    for name, (f, g) in bound.items():
        gap, spread, table = float(g(once) - f(once)), torch.cat(drawn[name]), contingency(both[name], rows, others)
        p_value, test = (
            (bootstrap_p_value(spread), "paired bootstrap") if table is None else (mcnemar(*table), "McNemar")
        )
        found[name] = Difference(gap, *_range(spread, 0.95), p_value, test)
    return found


def paired(rows: Records, others: Records) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """The samples that both have, in the order of the first; ``ClipgraftError`` when there is none."""
    place = {row["id"]: k for k, row in enumerate(others)}
    shared = [(row, others[place[row["id"]]]) for row in rows if row["id"] in place]
    if not shared:
        raise ClipgraftError("the two results share no sample; measure both on the same data")
    return [row for row, _ in shared], [other for _, other in shared]


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided p-value: the samples on which two models disagree are fair coin tosses (McNemar 1947)."""
    n, k = lost + won, min(lost, won)
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(k + 1)]
    return min(1.0, 2 * sum(math.exp(log) for log in logs)) if n else 1.0


def standard_error(hits: int, total: int) -> float:
    """Of the share hits / total: sqrt(p (1 - p) / n), binomial."""
    return math.sqrt(hits * (total - hits) / total**3) if total else math.nan


def bootstrap_p_value(differences: Tensor) -> float:
    """Twice the share of draws (b,) on the rarer side of zero, zero on both; never below 2 / (b + 1)."""
    seen = differences[~differences.isnan()]
    rarer = min(int((seen <= 0).sum()), int((seen >= 0).sum()))
    return min(1.0, 2 * (rarer + 1) / (len(seen) + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted for testing several at once (Holm 1979), in the given order."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, k in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[k]))
        adjusted[k] = largest
    return adjusted


def contingency(both: tuple[Statistic, Statistic], rows: Records, others: Records) -> tuple[int, int] | None:
    """How many only the first has right, and only the second; None where answers aren't right or wrong."""
    one, two = both
    if not (isinstance(one, Share) and isinstance(two, Share) and one == two and one.binary):
        return None
    pairs = [
        (a[one.hits], b[one.hits])
        for a, b in zip(rows, others, strict=True)
        if (one.where is None or a.get(one.where[0]) == one.where[1]) and None not in (a.get(one.hits), b.get(one.hits))
    ]
    if any(answer not in (0, 1) for pair in pairs for answer in pair):
        return None
    return sum(a > b for a, b in pairs), sum(b > a for a, b in pairs)


def _draws(n: int, draws: int, seed: int) -> Iterator[Tensor]:
    """(chunk, n) float64: how often each of n samples is drawn with replacement, in chunks of bounded memory."""
    generator, step = Generator().manual_seed(seed), max(1, CHUNK // max(n, 1))
    for start in range(0, draws, step):
        size = min(step, draws - start)
        rows = torch.randint(n, (size, n), generator=generator)
        ones = torch.ones(size, n, dtype=torch.float64)
        yield torch.zeros_like(ones).scatter_add_(1, rows, ones)


def _range(values: Tensor, level: float) -> tuple[float, float]:
    tail = (1 - level) / 2
    seen = values[~values.isnan()]
    if not len(seen):
        return math.nan, math.nan
    low, high = torch.quantile(seen, torch.tensor([tail, 1 - tail], dtype=seen.dtype))
    return float(low), float(high)


def _column(values: Sequence[Any]) -> Tensor:
    return torch.tensor([float(v) for v in values], dtype=torch.float64)
