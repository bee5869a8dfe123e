"""Images that look alike, found without comparing all with all.

Two hashes of 64 bits that differ in at most N bits agree in at least one of N + 1 bands (pigeonhole), so that only
hashes with a band in common are compared. Nothing within N is missed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from clipgraft.log import RunLog

BITS = 64
COLOUR = 24
"""Mean difference of thumbnails [0-255] from which images of one hash are different."""
_ONES = np.array([bin(k).count("1") for k in range(256)], dtype=np.uint8)


def near_duplicates(
    hashes: Sequence[int], thumbnails: Sequence[bytes], *, distance: int, log: RunLog | None = None
) -> dict[int, int]:
    """{index: an earlier index that looks like it}. The earlier one is never in the result itself.

    Alike: hashes differ in at most ``distance`` bits and thumbnails by less than ``COLOUR`` on average.
    """
    grid = np.frombuffer(b"".join(thumbnails), dtype=np.uint8).reshape(len(hashes), -1).astype(np.int16)
    found, kept = dict[int, int](), defaultdict[int, list[int]](list)
    for index, value in enumerate(hashes):
        same = kept[value]
        alike = np.flatnonzero(_far(grid[same], grid[index]) < COLOUR)
        if len(alike):
            found[index] = same[int(alike[0])]
        else:
            same.append(index)
    values = list(kept)
    partners = defaultdict[int, list[int]](list)
    for a, b in near_pairs(np.array(values, dtype=np.uint64), distance=distance, log=log):
        for i in kept[values[a]]:
            others = kept[values[b]]
            for j in np.flatnonzero(_far(grid[others], grid[i]) < COLOUR):
                first, second = sorted((i, others[int(j)]))
                partners[second].append(first)
    for index in sorted(partners):
        if (earlier := min((i for i in partners[index] if i not in found), default=None)) is not None:
            found[index] = earlier
    return {index: _last(found, earlier) for index, earlier in found.items()}


def near_pairs(hashes: NDArray[np.uint64], *, distance: int, log: RunLog | None = None) -> Iterator[tuple[int, int]]:
    """Index pairs (a < b) of distinct hashes that differ in at most ``distance`` bits, each pair once."""
    edges = [round(k * BITS / (distance + 1)) for k in range(distance + 2)]
    bands = [(hashes >> np.uint64(start)) & np.uint64((1 << (stop - start)) - 1) for start, stop in pairwise(edges)]
    with (log or RunLog()).progress("comparing", len(bands)) as bar:
        for k, band in enumerate(bands):
            order = np.argsort(band, kind="stable")
            for run in np.split(order, np.flatnonzero(np.diff(band[order])) + 1):
                for place, a in enumerate(run[:-1]):
                    others = run[place + 1 :]
                    close = _ones(hashes[others] ^ hashes[a]) <= distance
                    for earlier in bands[:k]:  # met there already
                        close &= earlier[others] != earlier[a]
                    yield from ((int(min(a, b)), int(max(a, b))) for b in others[close])
            bar.advance()


def _ones(values: NDArray[np.uint64]) -> NDArray[np.int64]:
    """How many bits are set in each."""
    bits: NDArray[np.int64] = _ONES[values.view(np.uint8).reshape(-1, 8)].sum(1, dtype=np.int64)
    return bits


def _far(grids: NDArray[np.int16], grid: NDArray[np.int16]) -> NDArray[np.float64]:
    """Mean difference of each row to one."""
    distances: NDArray[np.float64] = np.abs(grids - grid).mean(1)
    return distances


def _last(found: dict[int, int], index: int) -> int:
    """The one that is kept at the end of a chain."""
    while index in found:
        index = found[index]
    return index
