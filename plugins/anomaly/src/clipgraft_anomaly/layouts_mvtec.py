"""``mvtec:DIR``: MVTec AD's layout (Bergmann et al. 2019), of one kind of part or of many.

<part>/train/good/*.png, <part>/test/{good,<defect>}/*.png, <part>/ground_truth/<defect>/<stem>_mask.png.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clipgraft.data.images import MAX_PIXELS
from clipgraft.errors import InputError
from clipgraft_anomaly.inspection import GOOD
from clipgraft_anomaly.layouts import PartFiles, PartsConfig, Row, folders_in, masks_for, opened, pictures_below

MASKS = "ground_truth"


class MvtecConfig(PartsConfig):
    """MVTec AD, or anything in its layout."""


def mvtec(
    *, path: str, split: str = "test", object: str | Sequence[str] | None = None, max_pixels: int = MAX_PIXELS
) -> PartFiles:
    """DIR is the data set, or the folder of one part."""
    name, root = f"mvtec:{path}", Path(path).expanduser().resolve()
    if not root.is_dir():
        raise InputError(f"{name}: there is no such folder")
    alone = (root / "test").is_dir() or (root / "train").is_dir()
    parts = [root] if alone else [root / n for n in folders_in(root) if _is_part(root / n)]
    if not parts:
        raise InputError(
            f"{name}: no part with train/good and test found; give the unpacked data set, or folder:{path} for normal/ "
            "and abnormal/ folders"
        )
    rows = [row for part in parts for row in part_rows(part, root=root, source=name)]
    return opened(rows, name=name, root=root, split=split, objects=object, max_pixels=max_pixels)


def part_rows(part: Path, *, root: Path, source: str) -> list[Row]:
    """The pictures of one part in both splits, with their masks."""
    rows = []
    for split in ("train", "test"):
        if (part / split).is_dir():
            for kind in folders_in(part / split):
                images = pictures_below(part / split / kind, root=root)
                rows += [Row(image, int(kind != GOOD), part.name, kind, split) for image in images]
    masks = part / MASKS
    return masks_for(rows, masks, root=root, normal=(GOOD,), source=source) if masks.is_dir() else rows


def _is_part(folder: Path) -> bool:
    return (folder / "test").is_dir() or (folder / "train").is_dir()
