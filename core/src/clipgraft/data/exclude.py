"""A source without the samples of a list: what ``clipgraft data check --quarantine`` writes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clipgraft.data.base import BadSample, Drawn, Entry, Listed, Sample, Source, entry_of, varied_of
from clipgraft.errors import InputError
from clipgraft.log import RunLog

if TYPE_CHECKING:
    from torch import Generator


class Excluding:
    """``source`` without the samples whose ids are in ``excluded``; its fingerprint covers the list."""

    def __init__(self, source: Source, excluded: frozenset[str]) -> None:
        self.source, self.name = source, source.name
        self.classes: Sequence[str] = source.classes
        self.templates: Sequence[str] = source.templates
        self.attributes: Mapping[str, Sequence[str]] = source.attributes
        ids = [_id(source, index) for index in range(len(source))]
        self.indices = [index for index, name in enumerate(ids) if name not in excluded]
        self.unknown = sorted(excluded.difference(ids))
        digest = hashlib.sha256(source.fingerprint.encode())
        digest.update(repr(sorted(excluded)).encode("utf-8", "backslashreplace"))
        self.fingerprint = digest.hexdigest()
        if not self.indices:
            raise InputError(f"{self.name}: data.exclude leaves none of {len(source)} samples; shorten the list")

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        return self.source[self.indices[index]]

    def varied(self, index: int, rng: Generator) -> Sample:
        """As the source draws it."""
        return varied_of(self.source, self.indices[index], rng)

    def entry(self, index: int) -> Entry:
        """Everything but the image."""
        return entry_of(self.source, self.indices[index])

    def content(self, index: int) -> bytes:
        """The encoded image, where the source has one."""
        if not isinstance(self.source, Listed):
            raise LookupError(f"{self.name} holds no image files")
        return self.source.content(self.indices[index])


class ExcludingDrawn(Excluding):
    """The same of a source whose epochs hold planned amounts: these stay, drawn from what is left of each part."""

    @property
    def quotas(self) -> Sequence[tuple[Sequence[int], int]]:
        """Parts that the list empties are left out."""
        assert isinstance(self.source, Drawn)
        place = {index: k for k, index in enumerate(self.indices)}
        left = [([place[i] for i in part if i in place], count) for part, count in self.source.quotas]
        return [(part, count) for part, count in left if part]


def exclude(source: Source, path: str | Path, *, log: RunLog | None = None) -> Source:
    """``source`` without the ids that the UTF-8 file ``path`` lists, one per line, anything after a tab ignored.

    Ids that don't occur are told once.
    """
    try:
        lines = Path(path).expanduser().read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise InputError(f"data.exclude: {path} can't be read ({reason}); expected one sample id per line") from None
    names = frozenset(line.partition("\t")[0].strip() for line in lines) - {""}
    kind = ExcludingDrawn if isinstance(source, Drawn) else Excluding
    found = kind(source, names)
    if found.unknown:
        more = ", ..." if len(found.unknown) > 3 else ""
        told = f"{', '.join(found.unknown[:3])}{more}"
        (log or RunLog()).info(f"{source.name}: {len(found.unknown)} of {len(names)} excluded ids don't occur: {told}")
    return found


def _id(source: Source, index: int) -> str:
    try:
        return entry_of(source, index).id
    except BadSample as error:
        return error.sample_id
