"""Pictures of a source through a detector, one after the other, whole or in tiles; memory doesn't grow with them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clipgraft.data.base import BadSample, Sample, Source
from clipgraft.data.reading import GONE, usable_cores
from clipgraft.data.transforms import evaluation_transform
from clipgraft.errors import ClipgraftError
from clipgraft_anomaly.detector import Detector, detect
from clipgraft_anomaly.inspection import name_of
from clipgraft_anomaly.tiling import Mosaic, Tiling, resized

if TYPE_CHECKING:
    from clipgraft.data.base import Picture

READERS = 4
"""Threads that decode pictures ahead."""


@dataclass(frozen=True, slots=True)
class Inspected:
    """What a detector says of one picture of ``size`` (H, W') pixels. ``sample`` has no image any more.

    ``map`` is (S, S), or (H, W') when the picture was cut into tiles; ``parts`` is how many forward passes it took.
    """

    place: int
    sample: Sample
    size: tuple[int, int]
    score: float
    map: Tensor
    parts: int = 1

    def map_at(self, size: tuple[int, int]) -> Tensor:
        """The map at another size."""
        return resized(self.map, size)


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A picture that could not be read, and why."""

    place: int
    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class _Read:
    """A decoded picture: ``pixels`` (3, S, S) of all of it; the picture itself only where tiles are cut from it."""

    place: int
    sample: Sample
    size: tuple[int, int]
    pixels: Tensor
    picture: Picture | None


def inspect(
    detector: Detector,
    source: Source,
    places: Sequence[int],
    *,
    tiling: Tiling | None = None,
    batch_size: int = 8,
    name: str | None = None,
) -> Iterator[Inspected | Unreadable]:
    """Everything at ``places``, in order; ``name`` stands for the parts' own names in prompts.

    With tiles, a picture that is larger than one gets the highest score of its tiles and of all of it at once, and the
    mean of the tiles' maps; any other picture is inspected as without.
    """
    device = next(detector.parameters(), torch.empty(0)).device
    held: list[_Read | Unreadable] = []

    def flush() -> Iterator[Inspected | Unreadable]:
        whole = [item for item in held if isinstance(item, _Read)]
        names = [name or name_of(source, item.sample) for item in whole]
        found = iter(_detect(detector, [item.pixels for item in whole], names, device=device) if whole else ())
        for item in held:
            if isinstance(item, Unreadable):
                yield item
                continue
            score, scores = next(found)
            _check(detector, item, score, scores)
            yield Inspected(item.place, item.sample, item.size, score, scores)
        held.clear()

    for item in _read(detector, source, places, tiling=tiling, ahead=batch_size):
        if isinstance(item, _Read) and item.picture is not None:
            assert tiling is not None
            yield from flush()
            yield _tiled(detector, source, item, tiling, batch_size=batch_size, name=name, device=device)
            continue
        held.append(item)
        if sum(isinstance(one, _Read) for one in held) == batch_size:
            yield from flush()
    yield from flush()


def _tiled(
    detector: Detector,
    source: Source,
    item: _Read,
    tiling: Tiling,
    *,
    batch_size: int,
    name: str | None,
    device: torch.device,
) -> Inspected:
    """One large picture, ``batch_size`` tiles at a time."""
    assert item.picture is not None
    prepare, boxes, picture = evaluation_transform(detector.preprocess), tiling.boxes(item.size), item.picture
    called, mosaic = name or name_of(source, item.sample), Mosaic(item.size, tiling)
    (highest, whole), *_ = _detect(detector, [item.pixels], [called], device=device)
    _check(detector, item, highest, whole)
    remaining = iter(boxes)
    while batch := list(islice(remaining, batch_size)):
        inputs = [prepare(box.crop(picture)) for box in batch]
        for box, (score, scores) in zip(
            batch, _detect(detector, inputs, [called] * len(batch), device=device), strict=True
        ):
            _check(detector, item, score, scores)
            highest = max(highest, score)
            mosaic.add(box, scores)
    return Inspected(item.place, item.sample, item.size, highest, mosaic.map(), 1 + len(boxes))


def _detect(
    detector: Detector, pixels: Sequence[Tensor], names: Sequence[str], *, device: torch.device
) -> list[tuple[float, Tensor]]:
    found = detect(detector, torch.stack(list(pixels)).to(device), names)
    return list(zip(found.score.double().cpu().tolist(), found.map.float().cpu().clone(), strict=True))


def _check(detector: Detector, item: _Read, score: float, scores: Tensor) -> None:
    if not (torch.isfinite(torch.tensor(score)) and torch.isfinite(scores).all()):
        raise ClipgraftError(f"{detector.method} gave {item.sample.id} a score that is no number; check its weights")


def _read(
    detector: Detector, source: Source, places: Iterable[int], *, tiling: Tiling | None, ahead: int
) -> Iterator[_Read | Unreadable]:
    """Decoded pictures in order; threads read ``ahead`` of them, one when whole pictures are held for their tiles."""
    prepare = evaluation_transform(detector.preprocess)

    def read(place: int) -> _Read | Unreadable:
        try:
            sample = source[place]
        except BadSample as error:
            return Unreadable(place, error.sample_id, error.reason)
        size = size_of(sample.image)
        large = tiling is not None and len(tiling.boxes(size)) > 1
        return _Read(place, replace(sample, image=GONE), size, prepare(sample.image), sample.image if large else None)

    waiting: deque[Future[_Read | Unreadable]] = deque()
    with ThreadPoolExecutor(1 if tiling else min(READERS, usable_cores())) as threads:
        try:
            for place in places:
                waiting.append(threads.submit(read, place))
                if len(waiting) > (1 if tiling else ahead):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def size_of(picture: Picture) -> tuple[int, int]:
    """(H, W') of a PIL image or a tensor (3, H, W')."""
    if isinstance(picture, Tensor):
        return int(picture.shape[-2]), int(picture.shape[-1])
    return picture.height, picture.width
