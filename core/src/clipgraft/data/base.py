"""What a data source is: an indexable list of samples, or of minimal pairs, with what is known about their labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Generator, Tensor

    Picture = Image | Tensor
    """A PIL image (EXIF orientation applied, any mode) or a uint8 tensor (3, H, W')."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with what is known about it. ``id`` is stable and unique within the source.

    ``caption_weights``: how often training draws each caption, in proportion; empty for equally often. ``negatives``:
    captions that are wrong in a way worth learning or testing. ``group``: the part of a benchmark it belongs to.
    """

    id: str
    image: Picture
    captions: tuple[str, ...] = ()
    label: int | None = None
    attributes: Mapping[str, int] = field(default_factory=dict)
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    caption_weights: tuple[float, ...] = ()
    negatives: tuple[str, ...] = ()
    group: str = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of a sample without decoding its image; ``file`` is the image's file name, empty without one."""

    id: str
    captions: tuple[str, ...] = ()
    label: int | None = None
    group: str = ""
    file: str = ""


@dataclass(frozen=True, slots=True)
class Pair:
    """A minimal pair in the manner of MMVP-VLM: text i describes image i and not the other one."""

    id: str
    images: tuple[Picture, Picture]
    texts: tuple[str, str]
    pattern: str


@runtime_checkable
class Source(Protocol):
    """An indexable data source; ``source[i]`` is deterministic and safe in worker processes.

    ``classes[k]`` names label k, ``templates`` are prompts with one ``{}`` that suit the classes, ``attributes``
    {name: value names} describes ``Sample.attributes``. All three are empty when unknown. ``fingerprint`` changes
    whenever the samples do. ``source[i]`` raises ``BadSample`` for an unreadable sample.
    """

    name: str
    fingerprint: str
    classes: Sequence[str]
    templates: Sequence[str]
    attributes: Mapping[str, Sequence[str]]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@runtime_checkable
class Listed(Protocol):
    """What a source may offer beside ``Source``, so that ids, labels and groups are had without decoding images.

    ``content(i)`` is the encoded image file. Both raise ``BadSample`` for a sample that is known but can't be read;
    ``content`` raises ``LookupError`` when the sample has no file because its source makes pictures.
    """

    def entry(self, index: int) -> Entry: ...

    def content(self, index: int) -> bytes: ...


@runtime_checkable
class Drawn(Protocol):
    """A source of which an epoch holds a planned amount per part: ``quotas`` = (indices, how many draws of them).

    With an attribute ``together``, which divides every amount, that many consecutive samples come from one part.
    """

    @property
    def quotas(self) -> Sequence[tuple[Sequence[int], int]]: ...


@runtime_checkable
class Varied(Protocol):
    """A source that shows a sample differently every time, such as other frames of a video, as ``rng`` decides."""

    def varied(self, index: int, rng: Generator) -> Sample: ...


@runtime_checkable
class PairSource(Protocol):
    """An indexable source of minimal pairs; ``patterns`` are the names that ``Pair.pattern`` takes."""

    name: str
    fingerprint: str
    patterns: Sequence[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pair: ...


class BadSample(Exception):
    """One sample can't be read; ``reason`` is one short line without the path."""

    def __init__(self, sample_id: str, reason: str) -> None:
        super().__init__(f"{sample_id}: {reason}")
        self.sample_id, self.reason = sample_id, reason

    def __reduce__(self) -> tuple[type[BadSample], tuple[str, str]]:
        return BadSample, (self.sample_id, self.reason)


def entry_of(source: Source, index: int) -> Entry:
    """``source.entry(index)`` where the source offers it; else the sample is read, image and all."""
    if isinstance(source, Listed):
        return source.entry(index)
    sample = source[index]
    return Entry(sample.id, sample.captions, sample.label, sample.group)


def varied_of(source: Source, index: int, rng: Generator) -> Sample:
    """The sample as training sees it: drawn by ``rng`` where the source can, else as it is."""
    return source.varied(index, rng) if isinstance(source, Varied) else source[index]
