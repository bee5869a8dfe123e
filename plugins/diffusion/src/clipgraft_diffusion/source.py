"""A part of a data source, and the few images that measure a stage without being trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from clipgraft.data.base import Sample, Source


class Part:
    """The samples of ``source`` at ``rows``, with everything that is known about them."""

    def __init__(self, source: Source, rows: Sequence[int]) -> None:
        self.source, self.rows = source, rows
        self.name = source.name
        self.fingerprint = f"{source.fingerprint}[{len(rows)} rows {rows[0]}..{rows[-1]}]"
        self.classes: Sequence[str] = source.classes
        self.templates: Sequence[str] = source.templates
        self.attributes: Mapping[str, Sequence[str]] = source.attributes

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return self.source[self.rows[index]]


def held_out_split(source: Source, *, batch_size: int, most: int = 256) -> tuple[Source, Source]:
    """(training part, held-out part): every tenth image, or every k-th so that at most ``most`` are held out.

    A source too small to spare two images beside one batch is measured on its first images, which are trained on.
    """
    step = max(10, -(-len(source) // most))
    held = range(step - 1, len(source), step)
    if len(held) < 2 or len(source) - len(held) < batch_size:
        return source, Part(source, range(min(len(source), most)))
    return Part(source, [i for i in range(len(source)) if i % step != step - 1]), Part(source, held)
