"""The four numbers that a gain on minimal pairs is made of: {before, after} x {stock pooling, the paper's pooling}.

A published gain can be the training's, the pooling's, or chance; the table tells them apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from clipgraft.evaluation.base import Evaluation
from clipgraft.evaluation.statistics import mcnemar, standard_error

if TYPE_CHECKING:
    from rich.console import Group

EVALUATOR = "pairs-grid"
POOLINGS = {"cls": "class token", "official": "as in the paper", "pooled": "the tower's own"}
"""Columns of ``pairs-grid`` as people read them."""


@dataclass(frozen=True, slots=True)
class Cell:
    """Pairs that are right, of ``n``; ``mean`` over patterns and draws, ``sd`` over draws where patches are drawn."""

    right: int
    n: int
    mean: float
    sd: float | None = None

    @property
    def share(self) -> float:
        """Of the right pairs."""
        return self.right / self.n

    @property
    def error(self) -> float:
        """Binomial standard error of the share."""
        return standard_error(self.right, self.n)


@dataclass(frozen=True, slots=True)
class Column:
    """One pooling: both rows, the pairs that only one of them has right, and McNemar's exact p."""

    pooling: str
    before: Cell
    after: Cell
    lost: int
    won: int

    @property
    def p(self) -> float:
        """Two-sided; 1 where no pair differs."""
        return mcnemar(self.lost, self.won)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        cells = {
            when: asdict(cell) | {"share": cell.share, "standard_error": cell.error}
            for when, cell in (("before", self.before), ("after", self.after))
        }
        return {"pooling": self.pooling, **cells, "lost": self.lost, "won": self.won, "p": self.p}


@dataclass(frozen=True, slots=True)
class PoolingTable:
    """Both rows of one evaluator, of the ``n`` pairs that both measured; one column for a tower without class token."""

    evaluator: str
    columns: tuple[Column, ...]

    @property
    def n(self) -> int:
        """Pairs."""
        return self.columns[0].before.n

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"evaluator": self.evaluator, "n": self.n, "columns": [column.as_dict() for column in self.columns]}


def pooling_tables(before: Mapping[str, Evaluation], after: Mapping[str, Evaluation]) -> list[PoolingTable]:
    """A table per ``pairs-grid`` of both sides; empty where it wasn't measured or kept no records.

    One that was told a model ``before`` has both rows in itself: those measured after the run are taken.
    """
    found = []
    for name in [name for name in after if name.partition("@")[0].partition("[")[0].endswith(EVALUATOR)]:
        then, now = before.get(name), after[name]
        columns = [_column(now, "before", now, "after", pooling) for pooling in POOLINGS]
        if then is not None and not any(columns):
            columns = [_column(then, "own", now, "own", pooling) for pooling in POOLINGS]
        if kept := tuple(column for column in columns if column is not None):
            found.append(PoolingTable(name, kept))
    return found


def as_table(table: PoolingTable, *, names: tuple[str, str] = ("before", "after")) -> Group:
    """For people: counts, shares and standard errors in per cent, and p."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False)
    made.add_column("")
    for column in table.columns:
        made.add_column(POOLINGS[column.pooling], justify="right")
    for row, cells in zip(names, zip(*((c.before, c.after) for c in table.columns), strict=True), strict=True):
        made.add_row(Text(row), *(f"{c.right} = {c.share:.1%} ± {100 * c.error:.1f}" for c in cells))
    made.add_row("only one side right", *(f"{c.lost} lost, {c.won} won" for c in table.columns))
    made.add_row("McNemar p", *(f"{column.p:.2g}" for column in table.columns))
    note = f" ({table.n} pairs: how many are right by pooling, ± standard error)"
    return Group(Text.assemble((table.evaluator, "bold"), (note, "dim")), made)


def _column(then: Evaluation, first: str, now: Evaluation, second: str, pooling: str) -> Column | None:
    """The pairs of two rows joined by id; None when a side lacks the cell."""
    one, two = f"{first}/{pooling}", f"{second}/{pooling}"
    start, end = _hits(then.samples, one), _hits(now.samples, two)
    shared = [name for name in start if name in end]
    if not shared:
        return None
    hits = [(start[name], end[name]) for name in shared]
    before, after = (
        Cell(sum(side), len(hits), e.metrics.get(cell, sum(side) / len(hits)), e.metrics.get(f"{cell}/sd"))
        for e, cell, side in zip((then, now), (one, two), zip(*hits, strict=True), strict=True)
    )
    return Column(pooling, before, after, sum(a > b for a, b in hits), sum(b > a for a, b in hits))


def _hits(samples: Sequence[Mapping[str, Any]], cell: str) -> dict[str, int]:
    """{pair: whether it counts as right}; right in more than half of the draws where patches are drawn."""
    return {str(row["id"]): int(row[f"{cell}/counted"]) for row in samples if row.get(f"{cell}/counted") is not None}
