"""Contact sheets: what the world looks like, for eyes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from clipgraft_toyworld.crowds import crowds
from clipgraft_toyworld.defects import inspections
from clipgraft_toyworld.motion import FRAMES, videos
from clipgraft_toyworld.pairs import as_bytes, minimal_pairs
from clipgraft_toyworld.render import render
from clipgraft_toyworld.world import DETAILS, SHAPES, Split, generator, sample_jitter, sample_scene

if TYPE_CHECKING:
    from PIL.Image import Image

ROWS, COLUMNS, SCALE, GAP = 8, 12, 3, 3


def contact_sheet(kind: Literal["images", "pairs", "defects", "videos", "crowds"], *, split: Split, size: int) -> Image:
    """Pictures side by side, enlarged: pairs above each other, defects and crowds with their masks, a video per row."""
    from PIL import Image

    tiles = _tiles(kind, split=split, size=size)  # (rows, columns, 3, S, S) uint8
    rows, columns = tiles.shape[:2]
    side = size * SCALE
    sheet = torch.full((3, rows * (side + GAP) + GAP, columns * (side + GAP) + GAP), 128, dtype=torch.uint8)
    large = tiles.repeat_interleave(SCALE, -1).repeat_interleave(SCALE, -2)
    for row in range(rows):
        for column in range(columns):
            y, x = GAP + row * (side + GAP), GAP + column * (side + GAP)
            sheet[:, y : y + side, x : x + side] = large[row, column]
    return Image.fromarray(sheet.permute(1, 2, 0).numpy())


def _tiles(kind: str, *, split: Split, size: int) -> Tensor:
    if kind == "pairs":
        pairs = minimal_pairs(split, per_pattern=COLUMNS, size=size)
        both = torch.stack([pairs.first, pairs.second]).unflatten(1, (len(DETAILS), COLUMNS))
        return both.transpose(0, 1).flatten(0, 1)
    if kind == "videos":
        return videos(split, n=ROWS, size=size, frames=FRAMES).frames
    if kind == "defects":
        data = inspections(split, n=ROWS // 2 * COLUMNS, size=size, damaged=0.8)
        return _beside(data.image, data.mask.float(), size=size)
    if kind == "crowds":
        picture = crowds(split, n=ROWS // 2 * COLUMNS, size=size).picture
        return _beside(picture.image, picture.semantics / len(SHAPES), size=size)
    rng = generator(split, stream="images", seed=0, block=0)
    scene, jitter = sample_scene(ROWS * COLUMNS, rng), sample_jitter(ROWS * COLUMNS, rng)
    return as_bytes(render(scene, jitter, size=size).image).unflatten(0, (ROWS, COLUMNS))


def _beside(image: Tensor, mask: Tensor, *, size: int) -> Tensor:
    """Rows of pictures, each followed by a row of their masks."""
    gray = mask[:, None].expand(-1, 3, -1, -1)
    both = torch.stack([as_bytes(image), as_bytes(gray.float().clone())]).unflatten(1, (ROWS // 2, COLUMNS))
    return both.transpose(0, 1).flatten(0, 1)
