"""Which normal pictures WinCLIP remembers: a few of every kind of part, drawn by a seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from clipgraft.data.base import BadSample, Entry, Listed, Sample, Source, entry_of
from clipgraft.data.sampling import seeded
from clipgraft.errors import InputError
from clipgraft.evaluation.progress import LateBar
from clipgraft.log import RunLog
from clipgraft.registry import Registry
from clipgraft_anomaly.inspection import SCHEMES, name_of


def training_part(reference: str, *, registry: Registry) -> str:
    """A data reference with ``split=train``, unless it names a split or its data set has no test split as default."""
    path, _, query = reference.partition("?")
    scheme = path.partition(":")[0]
    settings = registry.config_class("dataset", SCHEMES.get(scheme, scheme))
    split = None if settings is None else settings.model_fields.get("split")
    if split is None or split.default != "test" or any(part.startswith("split=") for part in query.split("&")):
        return reference
    return f"{path}?{query}&split=train" if query else f"{path}?split=train"


def normal_pictures(source: Source, *, log: RunLog | None = None) -> dict[str, list[int]]:
    """{kind of part: places of its normal pictures in the source}; every kind that the source shows."""
    found: dict[str, list[int]] = {}
    known = source.attributes.get("object", ())
    with LateBar(log, f"looking for normal pictures in {source.name}", len(source)) as bar:
        for index in range(len(source)):
            bar.advance(1)
            try:
                entry = source.entry(index) if isinstance(source, Listed) else None
                if entry is not None and entry.group in known:
                    name, label = entry.group, entry.label
                else:
                    sample = source[index]
                    name, label = name_of(source, sample), sample.label
            except BadSample:
                continue
            found.setdefault(name, []).extend([index] if label == 0 else [])
    return found


def too_few(normal: Mapping[str, Sequence[int]], shots: int, *, source: Source) -> str:
    """What is wrong with so many normal pictures for ``shots`` of each kind; empty when nothing is."""
    poor = [f"{name} ({len(places)})" for name, places in normal.items() if len(places) < shots]
    if not poor:
        return ""
    more = f" and {len(poor) - 3} kinds more" if len(poor) > 3 else ""
    return (
        f"{source.name} has too few normal pictures for shots {shots}: {', '.join(poor[:3])}{more}; lower shots, "
        "choose parts with ?object=NAME, or another part of the data with ?split=NAME"
    )


@dataclass(frozen=True, slots=True)
class Drawn:
    """``places`` {kind of part: as many places as were asked for} and ``samples``, the pictures there."""

    places: Mapping[str, list[int]]
    samples: Mapping[str, list[Sample]]


def draw(source: Source, normal: Mapping[str, Sequence[int]], shots: int, *, seed: int) -> Drawn:
    """``shots`` readable pictures of every kind; a kind's choice doesn't depend on which others there are."""
    places: dict[str, list[int]] = {}
    samples: dict[str, list[Sample]] = {}
    for name, candidates in normal.items():
        places[name], samples[name], bad = [], [], []
        for at in torch.randperm(len(candidates), generator=seeded(seed, 0, name)).tolist():
            if len(places[name]) == shots:
                break
            try:
                samples[name].append(source[candidates[at]])
            except BadSample as error:
                bad.append(str(error))
                continue
            places[name].append(candidates[at])
        if len(places[name]) < shots:
            raise InputError(
                f"{source.name}: {len(places[name])} of {shots} normal pictures of {name} can be read ({bad[0]}); "
                "repair the data or lower shots"
            )
    return Drawn(places, samples)


class Chosen:
    """Some samples of a source, as a source; files stay files, so that their contents can be recognised."""

    def __init__(self, source: Source, places: Sequence[int]) -> None:
        self.source, self.places = source, list(places)
        self.name, self.fingerprint = source.name, f"{source.fingerprint}/{self.places}"
        self.classes, self.templates, self.attributes = source.classes, source.templates, source.attributes

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Sample:
        return self.source[self.places[index]]

    def content(self, index: int) -> bytes:
        """The encoded picture, where the source has files."""
        if not isinstance(self.source, Listed):
            raise LookupError(f"{self.name} holds no image files")
        return self.source.content(self.places[index])

    def entry(self, index: int) -> Entry:
        """Everything but the picture."""
        return entry_of(self.source, self.places[index])
