"""``parts:DIR``: your own pictures in folders named after what they show; masks are optional.

DIR, or each folder in it that is one kind of part, looks like one of these:

- normal/, abnormal/ and maybe mask/; folders inside abnormal/ are kinds of damage
- good/, one folder per kind of damage (scratch/, dent/, ...) and maybe ground_truth/
- train/ and test/ with such folders inside, and maybe ground_truth/ or mask/ beside them
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from clipgraft.data.images import MAX_PIXELS
from clipgraft.errors import InputError
from clipgraft_anomaly.inspection import GOOD
from clipgraft_anomaly.layouts import PartFiles, PartsConfig, Row, folders_in, masks_for, opened, pictures_below

NORMAL = frozenset(("normal", "good", "ok", "nominal"))
ABNORMAL = frozenset(("abnormal", "anomaly", "anomalous", "bad", "defect", "defects", "defective", "damaged", "ng"))
MASK = frozenset(("mask", "masks", "ground_truth", "groundtruth", "gt"))
SPLITS = ("train", "test")


class PartsFolderConfig(PartsConfig):
    """A folder of your own."""

    normal: str | None = Field(None, description="folder of normal pictures; null knows normal, good, ok, nominal")
    abnormal: str | None = Field(
        None, description="folder of anomalous pictures; null knows abnormal, anomaly, bad, defect, damaged, ng, ..."
    )
    mask: str | None = Field(None, description="folder of masks; null knows mask, masks, ground_truth, gt")
    name: str = Field("object", description="what the part is called where no folder says it; prompts may use it")


@dataclass(frozen=True, slots=True)
class Names:
    """What folders may be called, in lower case."""

    normal: Collection[str]
    abnormal: Collection[str]
    mask: Collection[str]

    def folder(self, parent: Path, kind: Collection[str], source: str) -> Path | None:
        """The one folder of a kind; two are refused."""
        found = [name for name in folders_in(parent) if name.lower() in kind]
        if len(found) > 1:
            raise InputError(f"{source}: {parent.name} holds {found[0]} and {found[1]}, which mean the same; keep one")
        return parent / found[0] if found else None


def parts(
    *,
    path: str,
    split: str = "test",
    object: str | Sequence[str] | None = None,
    max_pixels: int = MAX_PIXELS,
    normal: str | None = None,
    abnormal: str | None = None,
    mask: str | None = None,
    name: str = "object",
) -> PartFiles:
    """Without train/ and test/ all pictures are of the split ``test``."""
    source, root = f"parts:{path}", Path(path).expanduser().resolve()
    if not root.is_dir():
        raise InputError(f"{source}: there is no such folder")
    names = Names(
        NORMAL if normal is None else {normal.lower()},
        ABNORMAL if abnormal is None else {abnormal.lower()},
        MASK if mask is None else {mask.lower()},
    )
    _no_strays(root, source)
    if _is_part(root, names):
        called = {root: name}
    else:
        called = {root / n: n for n in folders_in(root) if _is_part(root / n, names)}
    if mask is not None and not any(names.folder(folder, names.mask, source) for folder in called):
        raise InputError(f"{source}: there is no folder {mask}; correct ?mask=NAME or leave it out")
    found = [row for f, n in called.items() for row in part_rows(f, n, root=root, names=names, source=source)]
    if not found:
        have = ", ".join(folders_in(root)) or "nothing"
        raise InputError(
            f"{source}: expected folders normal/ and abnormal/ (or train/ and test/), found {have}; rename them or "
            "give ?normal=NAME&abnormal=NAME"
        )
    return opened(found, name=source, root=root, split=split, objects=object, max_pixels=max_pixels)


def part_rows(part: Path, called: str, *, root: Path, names: Names, source: str) -> list[Row]:
    """The pictures of one kind of part, with their masks."""
    splits = [name for name in folders_in(part) if name.lower() in SPLITS]
    rows = []
    for split in splits:
        rows += _split_rows(part / split, called, split.lower(), root=root, names=names, source=source)
    if not splits:
        rows = _split_rows(part, called, "test", root=root, names=names, source=source)
    masks = names.folder(part, names.mask, source)
    return masks_for(rows, masks, root=root, normal=names.normal, source=source) if masks else rows


def _split_rows(folder: Path, called: str, split: str, *, root: Path, names: Names, source: str) -> list[Row]:
    """Pictures of ``folder``/{normal, abnormal}; without a folder for all anomalous ones, every other is a kind."""
    normal = names.folder(folder, names.normal, source)
    abnormal = names.folder(folder, names.abnormal, source)
    rows = [Row(image, 0, called, GOOD, split) for image in pictures_below(normal, root=root)] if normal else []
    others = [n for n in folders_in(folder) if n.lower() not in {*names.normal, *names.abnormal, *names.mask}]
    if abnormal is not None and others:
        raise InputError(
            f"{source}: {folder.name} holds {abnormal.name} and also {others[0]}, which says neither normal nor "
            f"anomalous; move it into {abnormal.name} or out of the data"
        )
    for kind in [abnormal.name] if abnormal else others:
        for image in pictures_below(folder / kind, root=root):
            inside = (root / image).parent.relative_to(folder).parts
            rows.append(Row(image, 1, called, "/".join(inside[1:] or inside), split))
    return rows


def _is_part(folder: Path, names: Names) -> bool:
    """Whether a folder has the shape of one kind of part."""
    inside = {name.lower() for name in folders_in(folder)}
    return bool(inside & {*SPLITS, *names.normal, *names.abnormal})


def _no_strays(root: Path, source: str) -> None:
    """Pictures directly in the folder are neither normal nor anomalous."""
    from clipgraft.data.images import SUFFIXES

    if stray := sorted(p.name for p in root.iterdir() if p.is_file() and p.suffix.lower() in SUFFIXES):
        raise InputError(
            f"{source}: {stray[0]} lies beside the folders, so nothing says whether it is normal; move it into normal/ "
            "or abnormal/ (for pictures without labels use clipgraft anomaly predict)"
        )
