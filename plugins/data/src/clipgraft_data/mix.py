"""``mix:``: several sources in one, each with its share of an epoch."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

from pydantic import Field

from clipgraft.config.load import parse_yaml, validate
from clipgraft.config.schema import Config
from clipgraft.data import open_source
from clipgraft.data.base import BadSample, Entry, Listed, Sample, Source, entry_of
from clipgraft.data.images import MAX_PIXELS
from clipgraft.errors import InputError


class Part(Config):
    """One entry of the list."""

    from_: str = Field(alias="from", description="data reference")
    weight: float = Field(1.0, gt=0, description="share of an epoch, in proportion")


class Mix:
    """All samples of all parts, part after part, ids prefixed with the part's number; ``quotas`` plan an epoch.

    Training draws round(share x size) samples of each part per epoch, another selection each time, and a small part
    several times; evaluation sees every sample once. Classes and prompts stay only where all parts have the same.
    """

    def __init__(self, *, path: str, size: int | None = None, max_pixels: int = MAX_PIXELS) -> None:
        self.name = f"mix:{path}"
        parts = _read(path, self.name)
        self.sources = [_opened(part.from_, self.name, max_pixels) for part in parts]
        first = self.sources[0]
        agreed = all([*s.classes] == [*first.classes] for s in self.sources)
        self.classes: Sequence[str] = first.classes if agreed else ()
        self.templates: Sequence[str] = (
            first.templates if agreed and all([*s.templates] == [*first.templates] for s in self.sources) else ()
        )
        known = [{name: tuple(values) for name, values in s.attributes.items()} for s in self.sources]
        self.attributes: Mapping[str, Sequence[str]] = known[0] if all(k == known[0] for k in known) else {}
        self.ends = list(accumulate(len(s) for s in self.sources))
        self.size = size or self.ends[-1]
        self.counts = apportioned([part.weight for part in parts], self.size)
        told = (self.size, [(part.weight, s.fingerprint) for part, s in zip(parts, self.sources, strict=True)])
        self.fingerprint = hashlib.sha256(repr(told).encode()).hexdigest()

    @property
    def quotas(self) -> Sequence[tuple[Sequence[int], int]]:
        """Indices of each part, and how many an epoch holds of them."""
        starts = [0, *self.ends]
        return [(range(a, b), n) for a, b, n in zip(starts, self.ends, self.counts, strict=False) if n]

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Sample:
        part, place = self._place(index)
        try:
            sample = self.sources[part][place]
        except BadSample as error:
            raise BadSample(f"{part}/{error.sample_id}", error.reason) from None
        attributes = {name: sample.attributes[name] for name in self.attributes if name in sample.attributes}
        label = sample.label if self.classes else None
        return replace(sample, id=f"{part}/{sample.id}", label=label, attributes=attributes)

    def entry(self, index: int) -> Entry:
        """Everything but the image."""
        part, place = self._place(index)
        try:
            entry = entry_of(self.sources[part], place)
        except BadSample as error:
            raise BadSample(f"{part}/{error.sample_id}", error.reason) from None
        return replace(entry, id=f"{part}/{entry.id}", label=entry.label if self.classes else None)

    def content(self, index: int) -> bytes:
        """The image file, where the part has files."""
        part, place = self._place(index)
        source = self.sources[part]
        if not isinstance(source, Listed):
            raise LookupError(f"{source.name} holds no image files")
        try:
            return source.content(place)
        except BadSample as error:
            raise BadSample(f"{part}/{error.sample_id}", error.reason) from None

    def _place(self, index: int) -> tuple[int, int]:
        index = range(len(self))[index]
        part = bisect_right(self.ends, index)
        return part, index - (self.ends[part - 1] if part else 0)


def apportioned(weights: Sequence[float], size: int) -> list[int]:
    """Whole numbers that add up to ``size`` in proportion to ``weights``: the largest remainders are rounded up."""
    exact = [weight / sum(weights) * size for weight in weights]
    counts = [int(value) for value in exact]
    order = sorted(range(len(exact)), key=lambda k: (counts[k] - exact[k], k))
    for k in order[: size - sum(counts)]:
        counts[k] += 1
    return counts


def _read(path: str, name: str) -> list[Part]:
    try:
        entries = parse_yaml(Path(path).expanduser().read_text("utf-8"), origin=name)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{name}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{name}: a mix of nothing; expected a list of {{from: REFERENCE, weight: NUMBER}}")
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise InputError(f"{name}: entry {number} is {entry!r}; expected {{from: REFERENCE, weight: NUMBER}}")
    return [validate(Part, entry, where=f"{name} entry {number}") for number, entry in enumerate(entries)]


def _opened(reference: str, name: str, max_pixels: int) -> Source:
    if reference.partition("?")[0].partition(":")[0].strip() in ("mix", "data/mix"):
        raise InputError(f"{name}: {reference} is a mix itself; list its parts here")
    source = open_source(reference, max_pixels=max_pixels)
    if hasattr(source, "patterns"):
        raise InputError(f"{name}: {reference} holds minimal pairs; a mix holds images")
    return source
