"""A source that says something else about the samples of another one: ids, images, labels and epochs stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from clipgraft.data.base import Drawn, Entry, Listed, Sample, Source, entry_of


class Relayed:
    """What ``source`` has, under another name; subclasses change ``__getitem__`` and, where captions change, ``entry``.

    A subclass for sources with planned epochs adds ``Quotas``.
    """

    def __init__(self, source: Source, *, name: str, fingerprint: str) -> None:
        self.source, self.name, self.fingerprint = source, name, fingerprint
        self.classes: Sequence[str] = source.classes
        self.templates: Sequence[str] = source.templates
        self.attributes: Mapping[str, Sequence[str]] = source.attributes
        self.together = getattr(source, "together", 0)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        return self.source[index]

    def entry(self, index: int) -> Entry:
        """Everything but the image."""
        return entry_of(self.source, index)

    def content(self, index: int) -> bytes:
        """The encoded image, where the source has one."""
        if not isinstance(self.source, Listed):
            raise LookupError(f"{self.name} holds no image files")
        return self.source.content(index)


class Quotas:
    """For a ``Relayed`` over a source of which an epoch holds planned amounts."""

    source: Source

    @property
    def quotas(self) -> Sequence[tuple[Sequence[int], int]]:
        """Those of the source."""
        assert isinstance(self.source, Drawn)
        return self.source.quotas
