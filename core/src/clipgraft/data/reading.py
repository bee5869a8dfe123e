"""Reading places of a source in order, here or in worker processes, with the same outcome."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any, cast

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader

from clipgraft.data.base import BadSample, Pair, PairSource, Sample, Source
from clipgraft.errors import ClipgraftError

PART = 8
"""Items that a worker process reads at a time: what it holds, and what shared memory must hold."""
WORTHWHILE = 3.0
"""Seconds of reading from which worker processes are worth starting."""
GONE = torch.empty(0)
"""Stands for an image that was encoded, or that travels beside its sample."""


@dataclass(slots=True)
class Part:
    """What reading some places of a source gave; ``pixels`` (m, 3, H, W') holds the images between processes."""

    items: list[Sample | Pair] = field(default_factory=list)
    bad: dict[int, BadSample] = field(default_factory=dict)
    pixels: Tensor | None = None


@dataclass
class Reader:
    """Places of a source to their items, images as pixels and ``extra`` dropped.

    Known errors are returned, because crossing a worker process would wrap them into many lines.
    """

    source: Source | PairSource
    transform: Callable[[Any], Tensor]

    def __getitem__(self, places: range) -> Part | ClipgraftError:
        found = Part()
        for index in places:
            try:
                item = self.source[index]
            except BadSample as error:
                found.bad[index] = error
                continue
            except ClipgraftError as error:
                return error
            if isinstance(item, Pair):
                pixels = self.transform(item.images[0]), self.transform(item.images[1])
                found.items.append(replace(item, images=pixels))
            else:
                found.items.append(replace(item, image=self.transform(item.image), extra={}))
        return found


def read(
    source: Source | PairSource,
    transform: Callable[[Any], Tensor],
    batches: Sequence[range],
    *,
    workers: int | None,
    world: int,
) -> Iterator[Part]:
    """One ``Part`` for every batch of places, in order. The global random state stays as it is.

    ``workers`` None reads the first batch here, and starts workers when the others would take seconds too.
    """
    reader, split = Reader(source, transform), [_split(places) for places in batches]
    parts = list(chain.from_iterable(split))
    found: Iterator[Part | ClipgraftError] = map(reader.__getitem__, parts)
    began = time.perf_counter()
    for number, size in enumerate(map(len, split)):
        batch = Part()
        if number == 0 and workers:
            found = _in_workers(reader, parts, workers)
        for part in islice(found, size):
            if isinstance(part, ClipgraftError):
                raise part
            batch.items += part.items
            batch.bad |= part.bad
        if number == 0 and workers is None:
            rest = parts[size:]
            if count := _worker_count((time.perf_counter() - began) * len(rest) / size, batch.items, world=world):
                found = _in_workers(reader, rest, count)
        yield batch


def stack_images(items: Sequence[Sample | Pair]) -> Tensor:
    """Images that are tensors -> (b, 3, H, W'); two rows per pair."""
    images = [image for item in items for image in (item.images if isinstance(item, Pair) else (item.image,))]
    return torch.stack([image for image in images if isinstance(image, Tensor)])


def without_images(item: Sample | Pair) -> Sample | Pair:
    """What is known about an item."""
    return replace(item, images=(GONE, GONE)) if isinstance(item, Pair) else replace(item, image=GONE, extra={})


def readable(source: Source | PairSource, index: int) -> bool:
    """Whether a sample that could not be read can be read by now."""
    try:
        source[index]
    except BadSample:
        return False
    return True


def _split(places: range) -> list[range]:
    return [places[first : first + PART] for first in range(0, len(places), PART)]


def _in_workers(reader: Reader, parts: Sequence[range], workers: int) -> Iterator[Part | ClipgraftError]:
    """The parts in order, read by worker processes of one thread each."""
    own, dataset = Generator(), cast(Any, reader)  # without a generator the DataLoader draws from the global one
    workers = min(workers, len(parts))
    pack = cast(Any, _pack)
    loader: DataLoader[Any] = DataLoader(
        dataset, None, sampler=parts, num_workers=workers, collate_fn=pack, generator=own
    )
    return map(_unpack, loader)


def _pack(part: Part | ClipgraftError) -> Part | ClipgraftError:
    """In the worker: all images as one tensor, which is one segment of shared memory."""
    if isinstance(part, ClipgraftError) or not part.items:
        return part
    return Part([without_images(item) for item in part.items], part.bad, stack_images(part.items))


def _unpack(part: Part | ClipgraftError) -> Part | ClipgraftError:
    """Here: every item with its rows again."""
    if isinstance(part, ClipgraftError) or part.pixels is None:
        return part
    rows = iter(part.pixels)
    items = [
        replace(i, images=(next(rows), next(rows))) if isinstance(i, Pair) else replace(i, image=next(rows))
        for i in part.items
    ]
    return Part(items, part.bad)


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _worker_count(seconds: float, items: Sequence[Sample | Pair], *, world: int) -> int:
    """As many as cores when ``seconds`` of reading are left, within the shared memory that their parts need."""
    if seconds < WORTHWHILE or not items or multiprocessing.current_process().daemon:
        return 0
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    room = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 2**40
    each = stack_images(items[:1]).nbytes * PART * 6  # two parts ahead and one at work; half is left to others
    return min(usable_cores() // here, room // here // each, 16)
