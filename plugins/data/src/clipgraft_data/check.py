"""What is wrong with a whole source: every sample inspected, then what only shows in comparison."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from clipgraft.data.base import Source
from clipgraft.log import RunLog
from clipgraft_data.duplicates import near_duplicates
from clipgraft_data.inspection import Facts, inspect

KINDS = {
    "missing-image": "no image file",
    "unreadable": "not an image that can be decoded",
    "bomb": "more pixels than are safe to decode",
    "tiny": "a side below the smallest that was allowed",
    "exact-duplicate": "the same file as an earlier sample",
    "near-duplicate": "looks like an earlier sample",
    "bad-caption": "captions that can't be read or don't fit their weights",
    "empty-caption": "a caption without a word",
    "no-caption": "no caption where others have one",
    "long-caption": "a caption that a model cuts",
    "repeated-caption": "one caption for many images",
    "wrong-extension": "another format than the name says",
    "exif-rotated": "upright only by its EXIF tag",
    "class-imbalance": "a class far from the largest",
}
"""What is looked for, in the order of the report."""
QUARANTINED = tuple(KINDS)[:9]
"""Kinds whose samples are better left out."""
IMBALANCE = 10
"""A class this many times smaller than the largest is reported."""
PART = 16
"""Samples that a worker process takes at a time."""


@dataclass
class Report:
    """``found`` {kind: [(id, reason)]}: every sample of each kind, in source order."""

    source: str
    fingerprint: str
    samples: int
    found: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: counts, the first ten of each kind, samples per class."""
        findings = {
            kind: {
                "count": len(self.found[kind]),
                "examples": [{"id": name, "reason": reason} for name, reason in self.found[kind][:10]],
            }
            for kind in KINDS
            if self.found.get(kind)
        }
        return {
            "source": self.source,
            "fingerprint": self.fingerprint,
            "samples": self.samples,
            "findings": findings,
            "classes": self.classes,
            "quarantined": len(self.quarantine()),
        }

    def quarantine(self) -> dict[str, str]:
        """{id: reason} of what is better left out; the reason starts with the kind."""
        found = dict[str, str]()
        for kind in QUARANTINED:
            for name, reason in self.found.get(kind, ()):
                found.setdefault(name, f"{kind}: {reason}")
        return found


def check(
    source: Source,
    *,
    near: int = 4,
    min_side: int = 32,
    repeated: int = 10,
    workers: int = 0,
    log: RunLog | None = None,
    **settings: Any,
) -> Report:
    """``near`` bits of difference make a near duplicate (-1 looks for none), ``repeated`` images a repeated caption.

    ``settings`` go to ``inspect``.
    """
    report, found = Report(source.name, source.fingerprint, len(source)), defaultdict[str, list[tuple[str, str]]](list)
    everything = list[Facts]()
    with (log or RunLog()).progress(f"checking {source.name}", len(source)) as bar:
        for facts in _inspected(source, workers, partial(inspect, min_side=min_side, **settings)):
            everything.append(facts)
            for kind, reason in facts.problems:
                found[kind].append((facts.id, reason))
            bar.advance()
    found["exact-duplicate"], distinct = _exact(everything)
    if near >= 0:
        pictures = [facts for facts in distinct if facts.hash is not None]
        hashes = [facts.hash for facts in pictures if facts.hash is not None]
        alike = (
            near_duplicates(hashes, [facts.thumbnail for facts in pictures], distance=near, log=log) if pictures else {}
        )
        found["near-duplicate"] = [(pictures[i].id, f"looks like {pictures[alike[i]].id}") for i in sorted(alike)]
    if any(facts.captions for facts in everything):
        found["no-caption"] = [
            (facts.id, "no caption")
            for facts in everything
            if not facts.captions and not any(kind == "bad-caption" for kind, _ in facts.problems)
        ]
    found["repeated-caption"] = list(_repeated(everything, repeated))
    counts = Counter(facts.label for facts in everything if facts.label is not None)
    report.classes = {name: counts[k] for k, name in enumerate(source.classes)}
    found["class-imbalance"] = list(_imbalance(report.classes))
    report.found = {kind: found[kind] for kind in KINDS if found[kind]}
    return report


def _inspected(source: Source, workers: int, look: Any) -> Iterator[Facts]:
    """Facts in source order."""
    if not workers:
        yield from (look(source, index) for index in range(len(source)))
        return
    parts = [range(start, min(start + PART, len(source))) for start in range(0, len(source), PART)]
    with ProcessPoolExecutor(workers, initializer=_begin, initargs=(source, look)) as pool:
        for facts in pool.map(_part, parts):
            yield from facts


_work: Any = None


def _begin(source: Source, look: Any) -> None:
    """In a worker process: what its parts are read from."""
    global _work
    _work = partial(look, source)


def _part(places: range) -> list[Facts]:
    return [_work(index) for index in places]


def _exact(everything: Iterable[Facts]) -> tuple[list[tuple[str, str]], list[Facts]]:
    """Later samples with the bytes of an earlier one, and the others."""
    first, copies, distinct = dict[bytes, str](), list[tuple[str, str]](), list[Facts]()
    for facts in everything:
        if facts.digest and facts.digest in first:
            copies.append((facts.id, f"the same as {first[facts.digest]}"))
            continue
        first[facts.digest] = facts.id
        distinct.append(facts)
    return copies, distinct


def _repeated(everything: Iterable[Facts], least: int) -> Iterator[tuple[str, str]]:
    """One line per caption: its first sample, and how many images it stands for."""
    images, first = Counter[str](), dict[str, str]()
    for facts in everything:
        for caption in {caption for caption in facts.captions if caption}:
            images[caption] += 1
            first.setdefault(caption, facts.id)
    for caption, count in images.most_common():
        if count < least:
            return
        yield first[caption], f"{count} images: {caption[:60]}"


def _imbalance(classes: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    largest = max(classes.values(), default=0)
    for name, count in sorted(classes.items(), key=lambda item: item[1]):
        if count * IMBALANCE < largest:
            yield name, f"{count} samples, the largest class has {largest}"
