"""Minimal pairs that were confused before and are told apart after, and those that went the other way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

from clipgraft.evaluation.statistics import mcnemar
from clipgraft.rundir import Record, RunRecord
from clipgraft_evaluation.pictures import as_image, as_uri

if TYPE_CHECKING:
    from clipgraft.data.base import Pair, PairSource


@dataclass(frozen=True, slots=True)
class Change:
    """How per-sample results moved: samples measured twice, right before and after, newly right, newly wrong.

    ``p_value``: exact two-sided sign test on the samples that changed (McNemar).
    """

    total: int
    before: int
    after: int
    gained: tuple[str, ...]
    lost: tuple[str, ...]
    p_value: float


@dataclass(frozen=True, slots=True)
class Card:
    """One pair for the page: two pictures as data URIs, their two texts, what they differ in.

    ``picked`` says for each text which image it picked before and after: "this" (its own), "other", "neither" (a tie).
    Empty when the records don't tell.
    """

    id: str
    pattern: str
    pictures: tuple[str, str]
    texts: tuple[str, str]
    picked: tuple[tuple[str, str], ...] = ()


def change(before: Sequence[Record], after: Sequence[Record]) -> Change | None:
    """Compare records that say ``correct``, joined by ``id``; None when there are no such records."""
    then = {str(r["id"]): bool(r["correct"]) for r in before if "correct" in r}
    now = {str(r["id"]): bool(r["correct"]) for r in after if "correct" in r}
    both = [name for name in then if name in now]
    if not both:
        return None
    gained = tuple(name for name in both if now[name] and not then[name])
    lost = tuple(name for name in both if then[name] and not now[name])
    counts = (sum(then[name] for name in both), sum(now[name] for name in both))
    return Change(len(both), *counts, gained, lost, mcnemar(len(lost), len(gained)))


def cards(run: RunRecord, evaluator: str, names: Sequence[str], *, at_most: int) -> list[Card]:
    """The pairs called ``names`` of a run, before and after it."""
    rows = run.samples("before", evaluator), run.samples("after", evaluator)
    return cards_of(run.data_of(evaluator), rows, names, at_most=at_most)


def cards_of(
    reference: str | None, rows: tuple[Sequence[Record], Sequence[Record]], names: Sequence[str], *, at_most: int
) -> list[Card]:
    """Pairs, a few of every pattern, their images opened from the data reference; ``rows`` are both sides' records."""
    from clipgraft.data import open_source

    if not names or reference is None:
        return []
    source: PairSource = open_source(reference)  # type: ignore[assignment]
    before, after = ({str(r["id"]): r for r in side} for side in rows)
    chosen = _mixed([(name, str(before[name].get("pattern", ""))) for name in names])[:at_most]
    return [_card(pair, before[pair.id], after[pair.id]) for pair in _find(source, chosen, list(before))]


def _mixed(named: Sequence[tuple[str, str]]) -> list[str]:
    """Names in an order that takes one of every pattern in turn."""
    groups: dict[str, list[str]] = {}
    for name, pattern in named:
        groups.setdefault(pattern, []).append(name)
    return [name for turn in zip_longest(*groups.values()) for name in turn if name is not None]


def _find(source: PairSource, names: Sequence[str], rows: Sequence[str]) -> Iterator[Pair]:
    """The pairs of ``names``. Records are in source order, so the row is tried first; skipped samples shift it."""
    place: dict[str, int] = {}
    for name in names:
        index = rows.index(name)
        if index < len(source) and (pair := source[index]).id == name:
            yield pair
            continue
        place = place or {source[i].id: i for i in range(len(source))}
        if name in place:
            yield source[place[name]]


def _card(pair: Pair, before: Record, after: Record) -> Card:
    pictures = (as_uri(as_image(pair.images[0])), as_uri(as_image(pair.images[1])))
    return Card(pair.id, pair.pattern, pictures, pair.texts, tuple(zip(_picked(before), _picked(after), strict=False)))


def _picked(record: Record) -> list[str]:
    """Per text the image that it picked, from the two margins by which its own image was preferred."""
    return ["this" if m > 0 else "other" if m < 0 else "neither" for m in record.get("margins", ())]
