"""Two sources as one: what is to be learnt, and what is not to be forgotten meanwhile."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Generator

from clipgraft.data.base import BadSample, Drawn, Entry, Listed, Sample, Source, entry_of, varied_of
from clipgraft.data.loader import class_prompts
from clipgraft.errors import InputError

PREFIX = "rehearsed/"


class Rehearsing:
    """Every sample of ``source`` and every one of ``also`` once per epoch; ids of ``also`` are prefixed.

    Captions are kept, or made of class names; labels and attributes, whose meanings may differ, are not.
    """

    def __init__(self, source: Source, also: Source) -> None:
        for one in (source, also):
            if isinstance(one, Drawn):
                raise InputError(f"{one.name} plans its epochs itself; put what is to be rehearsed into that mix")
        self.source, self.also, self.name = source, also, f"{source.name} + {also.name}"
        self.classes: Sequence[str] = ()
        self.templates: Sequence[str] = ()
        self.attributes: Mapping[str, Sequence[str]] = {}
        told = f"{source.fingerprint}|{also.fingerprint}"
        self.fingerprint = hashlib.sha256(told.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.source) + len(self.also)

    def _at(self, index: int) -> tuple[Source, int, str]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return (self.source, index, "") if index < len(self.source) else (self.also, index - len(self.source), PREFIX)

    def __getitem__(self, index: int) -> Sample:
        source, place, prefix = self._at(index)
        try:
            return _plain(source[place], source, prefix)
        except BadSample as error:
            raise BadSample(f"{prefix}{error.sample_id}", error.reason) from None

    def varied(self, index: int, rng: Generator) -> Sample:
        """As its source draws it."""
        source, place, prefix = self._at(index)
        try:
            return _plain(varied_of(source, place, rng), source, prefix)
        except BadSample as error:
            raise BadSample(f"{prefix}{error.sample_id}", error.reason) from None

    def entry(self, index: int) -> Entry:
        """Everything but the image."""
        source, place, prefix = self._at(index)
        try:
            found = entry_of(source, place)
        except BadSample as error:
            raise BadSample(f"{prefix}{error.sample_id}", error.reason) from None
        captions = _captions(found.captions, found.label, source)
        return replace(found, id=f"{prefix}{found.id}", captions=captions, label=None)

    def content(self, index: int) -> bytes:
        """The encoded image, where its source has one."""
        source, place, _ = self._at(index)
        if not isinstance(source, Listed):
            raise LookupError(f"{source.name} holds no image files")
        return source.content(place)


def _plain(sample: Sample, source: Source, prefix: str) -> Sample:
    captions = _captions(sample.captions, sample.label, source)
    return replace(sample, id=f"{prefix}{sample.id}", captions=captions, label=None, attributes={}, extra={})


def _captions(captions: tuple[str, ...], label: int | None, source: Source) -> tuple[str, ...]:
    if captions or label is None or not source.classes:
        return captions
    return class_prompts(source.classes[label], source.templates)
