"""What a data set for inspection is: pictures of parts, each normal or not, some with a mask of the damage.

Any data source with labels 0 (normal) and 1 (anomalous) will do; what is more than that is read by the functions here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from clipgraft.data.base import Sample, Source
from clipgraft.data.images import MAX_PIXELS
from clipgraft.errors import InputError

if TYPE_CHECKING:
    from clipgraft.log import RunLog
    from clipgraft.registry import Registry

CLASSES = ("normal", "anomalous")
GOOD = "good"
"""The kind of a normal picture."""
SCHEMES = {"folder": "anomaly/parts", "csv": "anomaly/parts-table"}
"""Data references that mean something else here than for classes and captions."""


@runtime_checkable
class Masked(Protocol):
    """A source that knows where the masks are, without reading pictures."""

    def mask(self, index: int) -> Tensor | None:
        """(H, W') uint8 0 or 1 of the picture's own size; None when the picture has no mask."""


def mask_of(source: Source, index: int, sample: Sample) -> Tensor | None:
    """The mask (H, W') uint8 of a sample: the source's, or ``extra["mask"]``; zeros for a normal picture without one.

    None means that the picture is anomalous and nobody says where.
    """
    found = source.mask(index) if isinstance(source, Masked) else sample.extra.get("mask")
    if found is not None:
        return (found > 0).to(torch.uint8)
    if sample.label:
        return None
    image = sample.image
    height, width = image.shape[-2:] if isinstance(image, Tensor) else (image.height, image.width)
    return torch.zeros(height, width, dtype=torch.uint8)


def names_of(source: Source) -> Sequence[str]:
    """The names of the inspected objects that the source knows; ("object",) when it knows none."""
    return tuple(source.attributes.get("object") or source.attributes.get("shape") or ("object",))


def name_of(source: Source, sample: Sample) -> str:
    """The name of the inspected object."""
    for attribute in ("object", "shape"):
        if attribute in source.attributes and attribute in sample.attributes:
            return source.attributes[attribute][sample.attributes[attribute]]
    return "object"


def resized_mask(mask: Tensor, size: int | tuple[int, int]) -> Tensor:
    """(H, W') -> (S, S) uint8: bilinear, then above one half (official code)."""
    target = (size, size) if isinstance(size, int) else size
    if tuple(mask.shape) == target:
        return mask
    return (F.interpolate(mask[None, None].float(), target, mode="bilinear", align_corners=False)[0, 0] > 0.5).byte()


def open_inspection(
    reference: str, *, registry: Registry | None = None, max_pixels: int = MAX_PIXELS, log: RunLog | None = None
) -> Source:
    """Any data reference with normal and anomalous pictures; ``folder:DIR`` is ``parts:DIR``, ``csv:FILE`` a table.

    What is odd about the data, such as missing masks, is said on ``log``.
    """
    from clipgraft.data import open_source

    scheme, colon, rest = reference.partition(":")
    source = open_source(SCHEMES.get(scheme, scheme) + colon + rest, registry=registry, max_pixels=max_pixels)
    if not isinstance(source, Source):
        raise InputError(f"{reference} holds minimal pairs; inspection needs single pictures, normal and anomalous")
    check_labels(source)
    if log is not None:
        for note in getattr(source, "notes", ()):
            log.info(note)
    return source


def check_labels(source: Source) -> None:
    """Raise when the source isn't about normal and anomalous."""
    if len(source.classes) != 2:
        raise InputError(
            f"{source.name} has {len(source.classes)} classes; inspection needs two, normal (0) and anomalous (1): "
            "give mvtec:DIR, visa:DIR, parts:DIR or toyworld/defects"
        )
