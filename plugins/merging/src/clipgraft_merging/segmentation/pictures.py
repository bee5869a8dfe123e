"""Pictures and their masks, one after the other, at the sizes that towers can take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from clipgraft.data.base import BadSample, Sample, Source
from clipgraft.data.loader import BadSamples
from clipgraft.data.transforms import evaluation_transform
from clipgraft.distributed import rank, to_all, world_size
from clipgraft.encoders.base import Preprocess
from clipgraft.errors import InputError
from clipgraft.evaluation.progress import LateBar
from clipgraft.evaluation.sharding import together

if TYPE_CHECKING:
    from clipgraft.log import RunLog

Shape = Literal["squash", "keep"]
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Frame:
    """One picture to segment: ``sample`` without its image, ``image`` as the source has it, (H, W') of it."""

    sample: Sample
    image: Any
    size: tuple[int, int]

    def pixels(self, preprocess: Preprocess, size: tuple[int, int]) -> Tensor:
        """(3, h, w) in [0, 1], the whole picture at that size; nothing is cropped, so pixels stay in their places."""
        return evaluation_transform(replace(preprocess, size=size, resize_mode="squash"))(self.image)

    def extra(self, name: str, source: Source) -> Tensor:
        """A mask of the sample; ``InputError`` when it has none."""
        found = self.sample.extra.get(name)
        if found is None:
            raise InputError(
                f"{source.name}: {self.sample.id} has no {name}; use a source with masks, such as "
                "merging/segmentation:DIR or toyworld/crowds"
            )
        return torch.as_tensor(found)


def target_size(
    size: tuple[int, int], *, side: int | None, native: tuple[int, int], step: int | None, shape: Shape
) -> tuple[int, int]:
    """(h, w) at which a picture of ``size`` is read.

    ``side`` is the shorter side [pixels], None the tower's own size. ``shape`` keep holds the aspect ratio up to whole
    cells of ``step`` pixels; squash makes it square. A tower that only knows its native size gets that.
    """
    if step is None:
        if side is not None and (side, side) != native:
            raise InputError(f"this tower takes {native[0]} x {native[1]} pixels and nothing else; leave size out")
        return native
    if side is None and shape == "squash":
        return native
    side = min(native) if side is None else side
    if side % step or side <= 0:
        near = max(1, round(side / step)) * step
        raise InputError(f"size {side} is no multiple of the tower's patch of {step} pixels; use {near}")
    if shape == "squash":
        return side, side
    short = min(size)

    def cells(length: int) -> int:
        return max(1, round(length * side / short / step)) * step

    return cells(size[0]), cells(size[1])


def frames(source: Source, bad: BadSamples, places: Sequence[int]) -> Iterator[Frame]:
    """The readable pictures of some places; the others go to ``bad``."""
    for index in places:
        try:
            sample = source[index]
        except BadSample as error:
            bad.add(index, error)
            continue
        image: Any = sample.image
        size = tuple(image.shape[-2:]) if isinstance(image, Tensor) else (image.height, image.width)
        yield Frame(replace(sample, image=torch.empty(0)), image, size)


def each_batch(
    source: Source,
    work: Callable[[list[Frame], tuple[int, int]], list[Row]],
    *,
    size_of: Callable[[tuple[int, int]], tuple[int, int]],
    batch_size: int,
    title: str,
    log: RunLog | None,
) -> tuple[list[Row], BadSamples]:
    """``work(frames, (h, w))`` on runs of pictures that are read at one size; returns all rows in source order.

    Each rank takes a run of places, and all ranks have all rows.
    """
    if hasattr(source, "patterns"):
        raise InputError(f"{source.name} holds minimal pairs; segmentation needs single pictures with masks")
    bad, n, world = BadSamples(len(source)), len(source), world_size()
    own = range(rank() * n // world, (rank() + 1) * n // world)

    def share() -> list[Row]:
        rows: list[Row] = []
        with LateBar(log, f"{title} {source.name}", len(own)) as bar:
            for size, batch in _runs(frames(source, bad, own), size_of, batch_size):
                with torch.no_grad():
                    rows += work(batch, size)
                bar.advance(len(batch))
        return rows

    rows = together(share)
    if world > 1:
        parts = to_all((rows, sorted(bad.indices), bad.first))
        rows = [row for part, _, _ in parts for row in part]
        bad = BadSamples(n, {i for _, indices, _ in parts for i in indices}, [f for _, _, some in parts for f in some])
    if not rows:
        raise InputError(f"{source.name} has nothing that can be read: {bad}")
    return rows, bad


def _runs(
    found: Iterator[Frame], size_of: Callable[[tuple[int, int]], tuple[int, int]], most: int
) -> Iterator[tuple[tuple[int, int], list[Frame]]]:
    """Neighbours that are read at one size, ``most`` at a time."""
    size, batch = (0, 0), list[Frame]()
    for frame in found:
        own = size_of(frame.size)
        if batch and (own != size or len(batch) == most):
            yield size, batch
            batch = []
        size = own
        batch.append(frame)
    if batch:
        yield size, batch


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Eval mode for a while; every module returns to the mode it had."""
    modes = {part: part.training for module in modules for part in module.modules()}
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
