"""Retrieval on the page of a run: captions with the pictures that they find, before and after it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from clipgraft.data.base import BadSample, Sample, Source
from clipgraft.errors import ClipgraftError
from clipgraft.reporting import Figure, Picture, Section, encoded
from clipgraft.rundir import Record, RunRecord

if TYPE_CHECKING:
    from clipgraft.registry import Registry

EVALUATOR = "core/retrieval"
QUERIES, FOUND, POOL, SIDE = 4, 5, 128, 128
"""Captions on the page, pictures for each, pictures among which they are found, their longest side [pixels]."""


class Pool:
    """A few samples of a source that are read once, as a source of their own."""

    templates: Sequence[str] = ()
    attributes: Mapping[str, Sequence[str]] = {}
    classes: Sequence[str] = ()

    def __init__(self, name: str, samples: Sequence[Sample]) -> None:
        self.name = self.fingerprint = name
        self.rows = list(samples)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return self.rows[index]


def retrieval_gallery(run: RunRecord, *, registry: Registry) -> list[Section]:
    """Captions with their nearest pictures; nothing for runs that measured no retrieval before and after."""
    measured = run.measured(EVALUATOR)
    kept = [row.evaluator for row in run.kept if row.evaluator.partition("@")[0].partition("[")[0] == EVALUATOR]
    if not measured and not kept:
        return []
    name, prefix = (measured[0], "") if measured else (kept[0], "retention-")
    reference = run.data_of(name) if measured else run.kept_data(name)
    if run.export is None or reference is None:
        raise ClipgraftError("this run wrote no export" if run.export is None else f"{name} names no data")
    sides = [_ranks(run.samples(f"{prefix}{when}", name)) for when in ("before", "after")]
    if not sides[0].keys() & sides[1].keys():
        raise ClipgraftError(f"{name} kept no records before and after the run")
    return [_section(run, reference, moved(*sides)[:QUERIES], list(sides[1]), registry=registry)]


def _section(
    run: RunRecord, reference: str, names: Sequence[str], rows: Sequence[str], *, registry: Registry
) -> Section:
    from clipgraft.data import open_source
    from clipgraft.encoders import load
    from clipgraft.evaluation.features import EncoderFeatures

    pool = pool_of(open_source(reference, registry=registry), names, rows)  # type: ignore[arg-type]
    asked = [sample for sample in pool.rows if sample.id in set(names)]
    captions = [sample.captions[0] for sample in asked]
    nearest = {}
    for when, model in (("before", run.base), ("after", str(run.path / "export"))):
        features = EncoderFeatures(load(model, registry=registry).eval())
        scores = features.texts(captions) @ features.images(pool).T
        nearest[when] = scores.topk(min(FOUND, len(pool))).indices.tolist()
    figures = [
        _figure(sample, when, [pool.rows[k] for k in places[row]])
        for row, sample in enumerate(asked)
        for when, places in nearest.items()
    ]
    return Section(
        "What captions find",
        f"Captions and the {FOUND} pictures nearest to each, before the run and after it, among {len(pool)} pictures "
        f"of {reference}. The mark is at the caption's own picture. Captions whose own picture moved most, up and "
        "down, and those that found it first both times, take turns.",
        tuple(figures),
    )


def _figure(asked: Sample, when: str, found: Iterable[Sample]) -> Figure:
    pictures = tuple(
        Picture(
            encoded(sample.image, side=SIDE),
            sample.captions[0] if sample.captions else f"picture {sample.id}",
            f"{place}{' its own' if sample.id == asked.id else ''}",
            "right" if sample.id == asked.id else "",
        )
        for place, sample in enumerate(found, start=1)
    )
    return Figure(pictures, f"{when}: {asked.captions[0]}", across=len(pictures))


def _ranks(rows: Iterable[Record]) -> dict[str, int]:
    """{picture: the rank at which its first caption finds it, from 0}."""
    return {str(row["id"]): int(row["image_ranks"][0]) for row in rows if row.get("image_ranks")}


def moved(before: Mapping[str, int], after: Mapping[str, int]) -> list[str]:
    """Pictures: those that moved up most, down most, and that were first both times take turns."""
    gains = {name: before[name] - after[name] for name in after if name in before}
    up = sorted((name for name, gain in gains.items() if gain > 0), key=lambda name: (after[name] > 0, -gains[name]))
    down = sorted((name for name, gain in gains.items() if gain < 0), key=lambda name: (before[name] > 0, gains[name]))
    same = [name for name, gain in gains.items() if gain == 0 and after[name] == 0]
    turns = [name for turn in zip_longest(up, down, same) for name in turn if name is not None]
    return turns + [name for name in gains if name not in set(turns)]


def pool_of(source: Source, names: Sequence[str], rows: Sequence[str]) -> Pool:
    """The pictures of ``names``, then others from all over the source, whose ids are ``rows`` as far as known."""
    places = {name: k for k, name in enumerate(rows)}
    step = max(1, len(source) // POOL)
    found: dict[str, Any] = {}
    for place in [*(places[name] for name in names), *range(0, len(source), step)]:
        if len(found) == POOL:
            break
        try:
            sample = source[place]
        except (BadSample, IndexError):
            continue
        found.setdefault(sample.id, sample)
    return Pool(source.name, list(found.values()))
