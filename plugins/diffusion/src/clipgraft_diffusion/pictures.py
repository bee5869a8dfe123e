"""Pictures that are too small to tell anything: found among the first ones before any work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from clipgraft.data.base import BadSample
from clipgraft.encoders.base import Encoder
from clipgraft.errors import ClipgraftError

if TYPE_CHECKING:
    from clipgraft.data.base import Picture
    from clipgraft.runner import Run

MOST = 16
"""Pictures of the training data that are looked at."""


def sides(picture: Picture) -> tuple[int, int]:
    """(height, width) [pixels]."""
    if isinstance(picture, Tensor):
        return int(picture.shape[-2]), int(picture.shape[-1])
    return picture.height, picture.width


def patch_side(encoder: Encoder) -> int:
    """Pixels per side that one token of the image tower stands for; 1 for a tower without a grid."""
    grid = encoder.image.grid
    return 1 if grid is None else max(1, encoder.preprocess.size[0] // grid[0])


def picture_problems(run: Run, *, smallest: int) -> list[str]:
    """Training data that can't be opened, or pictures among the first that are smaller than ``smallest`` pixels.

    A share of them below ``data.max_bad`` passes, as unreadable ones do.
    """
    data, small, seen = run.config.data, [], 0
    try:
        source = run.open_source(data.from_)
        for index in range(min(MOST, len(source))):
            try:
                sample = source[index]
            except BadSample:
                continue
            seen += 1
            small += [(sample.id, *sides(sample.image))] if min(sides(sample.image)) < smallest else []
    except ClipgraftError as error:
        return [str(error)]
    if not small or len(small) <= data.max_bad * seen:
        return []
    name, height, width = small[0]
    return [
        f"data.from: {name} is {width} x {height} px, smaller than one patch of {smallest} px ({len(small)} of the "
        f"first {seen} pictures); take such pictures out, or give larger ones"
    ]
