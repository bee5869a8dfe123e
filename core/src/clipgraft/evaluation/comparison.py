"""Two models on the same samples, metric by metric: the difference, how sure it is, and a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from clipgraft.errors import ClipgraftError, InputError
from clipgraft.evaluation.base import Evaluation
from clipgraft.evaluation.statistics import (
    DRAWS,
    Difference,
    Share,
    Statistic,
    contingency,
    differences,
    holm,
    mcnemar,
    paired,
    standard_error,
    value,
)

if TYPE_CHECKING:
    from rich.console import Group

    from clipgraft.log import RunLog

Verdict = Literal["better", "worse", "cannot tell", "not testable"]
UNTESTABLE: Verdict = "not testable"

MOST_DRAWS = 20_000
"""Of one comparison, whose smallest bootstrap p-value is then 0.0001 before its adjustment."""


@dataclass(frozen=True, slots=True)
class Row:
    """One metric of both models. ``difference`` = b minus a, with its 95 % interval; ``n`` samples measured on both.

    ``verdict`` is about b and knows of which metrics less is better. Without a statistic there is no test.
    """

    evaluator: str
    metric: str
    a: float
    b: float
    difference: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_adjusted: float | None = None
    test: str = UNTESTABLE
    verdict: Verdict = UNTESTABLE
    n: int | None = None

    @property
    def name(self) -> str:
        """``evaluator.metric``."""
        return f"{self.evaluator}.{self.metric}"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Row:
        """The inverse of ``as_dict``."""
        numbers = {k: math.nan if data[k] is None else data[k] for k in ("a", "b", "difference")}
        return cls(**{**data, **numbers})

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types; null for what isn't finite."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class Tally:
    """Right answers of two models to the same ``n`` questions; ``p`` is McNemar's exact one, of this tally alone."""

    evaluator: str
    metric: str
    a: int
    b: int
    n: int
    p: float

    def __str__(self) -> str:
        """``core/pairs.total 35 -> 43 of 135, 0.2593 ± 0.0377 -> 0.3185 ± 0.0401 (standard error), McNemar p = ...``"""
        then, now = (f"{k / self.n:.4f} ± {standard_error(k, self.n):.4f}" for k in (self.a, self.b))
        counts = f"{self.evaluator}.{self.metric} {self.a} -> {self.b} of {self.n}"
        return f"{counts}, {then} -> {now} (standard error), McNemar p = {self.p:.2g}"


def tallies(a: Mapping[str, Evaluation], b: Mapping[str, Evaluation]) -> list[Tally]:
    """One per metric that both have as a count over all samples; of the samples that both measured."""
    found = []
    for name, one, two in ((name, a[name], b[name]) for name in a if name in b):
        for metric, share in one.statistics.items():
            if not isinstance(share, Share) or share.where or metric not in one.counts.keys() & two.counts.keys():
                continue
            rows, others = paired(one.samples, two.samples)
            if table := contingency((share, two.statistics.get(metric, share)), rows, others):
                hits = [round(value(share, side) * len(rows)) for side in (rows, others)]
                found.append(Tally(name, metric, hits[0], hits[1], len(rows), mcnemar(*table)))
    return found


def compare(
    a: Mapping[str, Evaluation], b: Mapping[str, Evaluation], *, alpha: float = 0.05, log: RunLog | None = None
) -> list[Row]:
    """A row per metric that both have, evaluators joined by name and samples by id; p-values adjusted over the table.

    Values are of the shared samples where the two differ. A statistic that one side lacks, because it was read from
    disk, is the other's if that gives its metric. Tables of many rows draw more often, up to ``MOST_DRAWS``, so that
    the adjustment (Holm 1979) can't by itself keep a bootstrap below ``alpha`` out of reach. ``InputError`` when two
    results share no sample.
    """
    if not 0 < alpha < 1:
        raise InputError(f"alpha is {alpha}; give a share between 0 and 1, such as 0.05")
    both = {name: (a[name], b[name]) for name in a if name in b}
    statistics = {name: _statistics(*pair) for name, pair in both.items()}
    tests = sum(map(len, statistics.values()))
    draws = max(DRAWS, min(MOST_DRAWS, math.ceil(20 * tests / alpha)))  # the least adjusted p is a tenth of alpha
    rows: list[Row] = []
    with log.progress("comparing", len(both)) if log else nullcontext() as bar:
        for name, (one, two) in both.items():
            rows += _rows(name, one, two, statistics[name], draws=draws)
            if bar is not None:
                bar.advance()
    tested = [row for row in rows if row.p is not None]
    adjusted = dict(zip([row.name for row in tested], holm([row.p or 0.0 for row in tested]), strict=True))
    lower = {f"{name}.{metric}" for name, pair in both.items() for e in pair for metric in {"skipped", *e.lower}}
    return [_judged(row, adjusted.get(row.name), row.name in lower, alpha) for row in rows]


def _statistics(one: Evaluation, two: Evaluation) -> dict[str, tuple[Statistic, Statistic]]:
    """{metric: statistic of each side} of the metrics that both have, if both kept samples."""
    found = {}
    for name in [name for name in one.metrics if name in two.metrics and one.samples and two.samples]:
        f = one.statistics.get(name) or _borrowed(name, two, one)
        g = two.statistics.get(name) or _borrowed(name, one, two)
        if f is not None and g is not None:
            found[name] = (f, g)
    return found


def _borrowed(name: str, owner: Evaluation, other: Evaluation) -> Statistic | None:
    """The owner's statistic, if the other's metric follows with it; one that holds embeddings is the owner's alone."""
    if (statistic := owner.statistics.get(name)) is None:
        return None
    try:
        found = value(statistic, other.samples)
    except Exception:  # made for other records
        return None
    return statistic if math.isclose(found, other.metrics[name], rel_tol=1e-6, abs_tol=1e-9) else None


def _rows(
    name: str, one: Evaluation, two: Evaluation, statistics: Mapping[str, tuple[Statistic, Statistic]], *, draws: int
) -> list[Row]:
    """Values, differences and unadjusted tests of one evaluator."""
    found: dict[str, Difference] = {}
    metrics = [metric for metric in one.metrics if metric in two.metrics]
    then, now, n = dict(one.metrics), dict(two.metrics), None
    if statistics:
        try:
            rows, others = paired(one.samples, two.samples)
        except ClipgraftError as error:
            raise InputError(f"{name}: {error}") from error
        first, second = ({metric: pair[side] for metric, pair in statistics.items()} for side in (0, 1))
        found, n = differences((first, rows), (second, others), draws=draws), len(rows)
        if not len(one.samples) == len(two.samples) == n:
            then |= {metric: value(statistic, rows) for metric, statistic in first.items()}
            now |= {metric: value(statistic, others) for metric, statistic in second.items()}
    made = []
    for metric in metrics:
        row = Row(name, metric, then[metric], now[metric], now[metric] - then[metric])
        if d := found.get(metric):
            row = replace(row, difference=d.value, low=d.low, high=d.high, p=d.p_value, test=d.test, n=n)
        made.append(row)
    return made


def _judged(row: Row, adjusted: float | None, lower: bool, alpha: float) -> Row:
    if adjusted is None:
        return row
    sure = adjusted <= alpha and row.difference != 0 and math.isfinite(row.difference)
    verdict: Verdict = "cannot tell" if not sure else "better" if (row.difference > 0) != lower else "worse"
    return replace(row, p_adjusted=adjusted, verdict=verdict)


def as_table(rows: Sequence[Row], *, names: tuple[str, str], title: str = "", width: int = 80) -> Group:
    """For people, ``width`` columns wide: an aligned block per evaluator, p-values adjusted."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    styles, heads = {"better": "green", "worse": "red"}, ("", *names, "difference, 95 % interval", "p", "verdict")
    lines = {row.name: _cells(row) for row in rows}
    widths = [max(map(len, column)) for column in zip(heads, *lines.values(), strict=True)]
    widths[0] = max(12, min(widths[0], width - sum(widths[1:]) - len(widths)))  # long names are folded
    tests = sum(row.p is not None for row in rows)
    parts: list[Text | Table] = [Text(title, "bold")] if title else []
    for evaluator in dict.fromkeys(row.evaluator for row in rows):
        own = [row for row in rows if row.evaluator == evaluator]
        shared = next((f" ({row.n} samples)" for row in own if row.n is not None), "")
        parts.append(Text.assemble((evaluator, "bold"), (shared, "dim")))
        block = Table.grid(padding=(0, 1, 0, 0))
        for k, wide in enumerate(widths):
            block.add_column(width=wide, justify="right" if 0 < k < 5 else "left", overflow="fold")
        block.add_row(*(Text(head, "dim") for head in heads))
        for row in own:
            *cells, verdict = lines[row.name]
            block.add_row(*map(Text, cells), Text(verdict, styles.get(verdict, "dim")))
        parts.append(block)
    return Group(*parts, *([Text(f"p adjusted for {tests} tests (Holm)", "dim")] if tests else []))


def _cells(row: Row) -> tuple[str, ...]:
    spread = "" if row.low is None else f" [{row.low:+.4f}, {row.high:+.4f}]"
    p = "" if row.p_adjusted is None else f"{row.p_adjusted:.2g}"
    return f" {row.metric}", f"{row.a:.4f}", f"{row.b:.4f}", f"{row.difference:+.4f}{spread}", p, row.verdict
