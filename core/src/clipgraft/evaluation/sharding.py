"""Work that is split over ranks: its rows everywhere afterwards, its errors too."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

from clipgraft.distributed import to_all, world_size
from clipgraft.errors import ClipgraftError, InputError

T = TypeVar("T")
CHUNK = 2**24
"""Numbers that a rank sends at a time."""


def all_rows(rows: Tensor | None) -> Tensor | None:
    """(m, ...) fp32 on the CPU of each rank, None where it has none -> (n, ...) in rank order, everywhere.

    Ranks may have different m. None when no rank has any.
    """
    if world_size() == 1:
        return rows
    shapes = to_all(None if rows is None else tuple(rows.shape))
    counts, tails = [shape[0] if shape else 0 for shape in shapes], [shape[1:] for shape in shapes if shape]
    if not tails:
        return None
    found = torch.empty(sum(counts), *tails[0])
    firsts, step = [0, *accumulate(counts)], max(1, CHUNK // max(math.prod(tails[0]), 1))
    for start in range(0, max(counts), step):
        own = None if rows is None else rows[start : start + step].numpy()  # pickles what it shows, a tensor all of it
        for first, part in zip(firsts, to_all(own), strict=False):
            if part is not None:
                found[first + start : first + start + len(part)] = torch.from_numpy(part)
    return found


def together(work: Callable[[], T]) -> T:
    """``work()`` on every rank; an error on one of them is raised on all, so that none waits for it."""
    if world_size() == 1:
        return work()
    try:
        found, error = work(), None
    except Exception as caught:
        found, error = None, caught
    lines = to_all(None if error is None else (isinstance(error, InputError), _line(error)))
    if error is not None:
        raise error
    for rank, line in enumerate(lines):
        if line is not None:
            raise (InputError if line[0] else ClipgraftError)(f"rank {rank}: {line[1]}")
    return found  # type: ignore[return-value]  # there was no error here


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, ClipgraftError) else f"{type(error).__name__}: {text}"
