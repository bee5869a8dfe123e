"""What a detector was trained on, in a form that travels with it, and whether a test set holds any of it.

Pictures are compared by content, so that copies, other names and other folders are seen through. A record keeps the
smallest digests, which are a random sample of the pictures.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Self

import torch
from pydantic import Field

from clipgraft.config.schema import Config
from clipgraft.data.base import BadSample, Listed, Source
from clipgraft.errors import InputError
from clipgraft.evaluation.progress import LateBar
from clipgraft.log import RunLog

SAMPLE = 256
"""Digests that a record keeps."""


class DataRecord(Config):
    """A data set as a detector remembers it."""

    reference: str = Field("", description="how the data were named")
    fingerprint: str = Field("", description="of the source, where and as it was")
    pictures: int = Field(0, ge=0, description="how many it held")
    digests: tuple[str, ...] = Field((), description="the smallest digests of their contents")

    @classmethod
    def of(cls, reference: str, source: Source, *, log: RunLog | None = None) -> Self:
        """Reads every picture."""
        found = sorted(digests(source, log=log))
        return cls(
            reference=reference, fingerprint=source.fingerprint, pictures=len(source), digests=tuple(found[:SAMPLE])
        )


def refuse_same(
    trained: DataRecord | Mapping[str, Any] | None,
    source: Source,
    *,
    allow_same: bool = False,
    log: RunLog | None = None,
) -> int:
    """How many remembered training pictures ``source`` holds; ``InputError`` when it is any, unless allowed.

    None, for a detector that nothing was trained for, is 0. A picture that both sets share is missed when it isn't
    among the 256 that were remembered; the others it is compared with are all of ``source``.
    """
    if trained is None:
        return 0
    record = trained if isinstance(trained, DataRecord) else DataRecord.model_validate(trained)
    shared = set(record.digests) & digests(source, log=log) if record.digests else set[str]()
    if shared and not allow_same:
        raise InputError(
            f"{source.name} holds {len(shared)} of {len(record.digests)} sampled pictures that the detector was "
            f"trained on ({record.reference or 'unnamed'}), so its numbers would mean nothing; test on "
            "other data, or say --allow-same"
        )
    return len(shared)


def digests(source: Source, *, log: RunLog | None = None) -> set[str]:
    """One digest per readable picture."""
    found = set()
    with LateBar(log, f"comparing the pictures of {source.name}", len(source)) as bar:
        for index in range(len(source)):
            bar.advance(1)
            try:
                found.add(hashlib.sha256(_content(source, index)).hexdigest()[:16])
            except BadSample:
                continue
    return found


def _content(source: Source, index: int) -> bytes:
    """The encoded file where there is one, else the pixels."""
    try:
        if isinstance(source, Listed):
            return source.content(index)
    except LookupError:  # its source makes pictures
        pass
    image = source[index].image
    if isinstance(image, torch.Tensor):
        return repr(tuple(image.shape)).encode() + image.contiguous().numpy().tobytes()
    return repr((image.size, image.mode)).encode() + image.tobytes()
