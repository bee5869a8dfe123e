"""Pictures of parts in files with masks beside them: what every layout becomes, and how masks find their pictures."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import Field
from torch import Tensor

from clipgraft.config.schema import Config
from clipgraft.data.base import BadSample, Entry, Sample
from clipgraft.data.images import LEAVES, MAX_PIXELS, SUFFIXES, read_image
from clipgraft.errors import InputError, unknown_name
from clipgraft_anomaly.inspection import CLASSES, GOOD
from clipgraft_anomaly.mask_files import read_mask

Split = Literal["train", "test"]
MASK_ENDINGS = ("_mask", "-mask", "_gt")
"""What a mask's name may have behind its picture's, before the suffix."""
LOSSY = (".jpg", ".jpeg")


@dataclass(frozen=True, slots=True)
class Row:
    """One picture; paths are relative to the data's root, with slashes. ``mask`` is None without one."""

    image: str
    label: int
    object: str
    kind: str = GOOD
    split: str = "test"
    mask: str | None = None


class PartsConfig(Config):
    """What every layout takes."""

    path: str = Field(description="the data set's folder (or its table)")
    split: Split = Field("test", description="which part of the data; they never share a picture")
    object: str | tuple[str, ...] | None = Field(None, description="only this kind of part, or these; null for all")
    max_pixels: int = Field(MAX_PIXELS, gt=0, description="larger pictures are refused as decompression bombs [pixels]")


@dataclass
class PartFiles:
    """A source of pictures of parts: label 0 normal, 1 anomalous; attributes ``object`` and ``kind``; group = object.

    Nothing is read before it is asked for. ``notes`` are lines about what is odd in the data and was let pass.
    """

    name: str
    root: Path
    rows: Sequence[Row]
    max_pixels: int = MAX_PIXELS
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.classes: Sequence[str] = CLASSES
        self.templates: Sequence[str] = ()
        kinds = sorted({row.kind for row in self.rows} - {GOOD})
        self.attributes: Mapping[str, Sequence[str]] = {
            "object": tuple(dict.fromkeys(row.object for row in self.rows)),
            "kind": (GOOD, *kinds),
        }
        self._number = {name: {v: k for k, v in enumerate(values)} for name, values in self.attributes.items()}
        digest = hashlib.sha256()
        for row in self.rows:
            sizes = [_stat(self.root, path) for path in (row.image, row.mask)]
            digest.update(repr((row, sizes)).encode("utf-8", "backslashreplace"))
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = self.rows[index]
        return Sample(
            row.image,
            read_image(self.root / row.image, root=self.root, sample_id=row.image, max_pixels=self.max_pixels),
            label=row.label,
            attributes={"object": self._number["object"][row.object], "kind": self._number["kind"][row.kind]},
            group=row.object,
        )

    def entry(self, index: int) -> Entry:
        """Everything but the picture."""
        row = self.rows[index]
        return Entry(row.image, (), row.label, row.object, row.image)

    def content(self, index: int) -> bytes:
        """The picture's file."""
        row = self.rows[index]
        path = (self.root / row.image).resolve()
        if not path.is_relative_to(self.root):
            raise BadSample(row.image, LEAVES)
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise BadSample(row.image, "missing file") from None
        except OSError as error:
            raise BadSample(row.image, error.strerror or "can't be read") from None

    def mask(self, index: int) -> Tensor | None:
        """(H, W') uint8 0 or 1; ``BadSample`` when its file can't be read, ``InputError`` when it has another size."""
        row = self.rows[index]
        return None if row.mask is None else read_mask(self, row.image, row.mask)


def pictures_below(folder: Path, *, root: Path) -> list[str]:
    """Picture files in ``folder`` and below, sorted, relative to ``root``; hidden ones and linked folders are not."""
    found = []
    for here, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        found += [
            Path(here, file).relative_to(root).as_posix()
            for file in files
            if Path(file).suffix.lower() in SUFFIXES and not file.startswith(".")
        ]
    return sorted(found)


def folders_in(folder: Path) -> list[str]:
    """Names of the folders in ``folder``, sorted, without hidden ones."""
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))


def paired(images: Iterable[str], masks: Iterable[str], *, below: str, source: str) -> dict[str, str]:
    """{picture: its mask}: the mask's stem is the picture's, with or without one of ``MASK_ENDINGS``.

    ``below`` is the folder of the masks; sub-folders of it must be those of the picture (``scratch/000_mask`` suits
    ``test/scratch/000``). A picture with two masks, or a mask of two pictures, is refused.
    """
    by_stem: dict[str, list[PurePosixPath]] = {}
    for image in images:
        path = PurePosixPath(image)
        by_stem.setdefault(path.stem, []).append(path)
    found: dict[str, str] = {}
    for mask in masks:
        path = PurePosixPath(mask)
        if path.suffix.lower() in LOSSY:
            raise InputError(f"{source}: mask {mask} is a JPEG, whose edges hold false values; save masks as PNG")
        inside = path.relative_to(below).parent.parts
        bare = next((path.stem[: -len(end)] for end in MASK_ENDINGS if path.stem.lower().endswith(end)), None)
        stems = {path.stem} if bare is None else {path.stem, bare}
        owners = [p for s in stems for p in by_stem.get(s, ()) if _ends_with(p.parent.parts, inside)]
        if len(owners) > 1:
            told = " and ".join(str(owner) for owner in sorted(owners)[:2])
            raise InputError(
                f"{source}: mask {mask} could belong to {told}; give masks the sub-folders of the pictures"
            )
        for owner in map(str, owners):
            if owner in found:
                raise InputError(f"{source}: {owner} has two masks, {found[owner]} and {mask}; keep one of them")
            found[owner] = mask
    return found


def masks_for(rows: Sequence[Row], folder: Path, *, root: Path, normal: Iterable[str], source: str) -> list[Row]:
    """``rows`` with the masks below ``folder``, which belong to anomalous pictures; an empty folder is an error."""
    below = folder.relative_to(root).as_posix()
    empty = [name for name in folders_in(folder) if name.lower() not in normal and not any((folder / name).iterdir())]
    masks = pictures_below(folder, root=root)
    if not masks or empty:
        bare = f"{below}/{empty[0]}" if masks else below
        raise InputError(
            f"{source}: the mask folder {bare} is empty; put masks there (PNG, named as their pictures) or remove it"
        )
    anomalous = [row.image for row in rows if row.label]
    mine = paired(anomalous, masks, below=below, source=source)
    if anomalous and not mine:
        raise InputError(
            f"{source}: none of {len(masks)} masks in {below} belongs to an anomalous picture ({masks[0]} is no mask "
            f"of {anomalous[0]}); name masks as their pictures, _mask may follow"
        )
    return [Row(r.image, r.label, r.object, r.kind, r.split, mine.get(r.image)) for r in rows]


def opened(
    rows: Sequence[Row],
    *,
    name: str,
    root: Path,
    split: str | None,
    objects: str | Sequence[str] | None,
    max_pixels: int,
) -> PartFiles:
    """The rows of one split (None for all) and some objects as a source, with notes about missing masks."""
    known = dict.fromkeys(row.object for row in rows)
    wanted = None if objects is None else (objects,) if isinstance(objects, str) else tuple(objects)
    for one in wanted or ():
        if one not in known:
            raise unknown_name("object", one, list(known))
    kept = [r for r in rows if split in (None, r.split) and (wanted is None or r.object in wanted)]
    if not kept:
        have = ", ".join(sorted({row.split for row in rows})) or "none"
        raise InputError(f"{name}: no picture of split {split}, it has: {have}; choose another with ?split=NAME")
    bare = [row.image for row in kept if row.label and row.mask is None]
    notes = []
    if bare:
        more = ", ..." if len(bare) > 3 else ""
        notes.append(
            f"{name}: {len(bare)} of {sum(row.label for row in kept)} anomalous pictures have no mask "
            f"({', '.join(bare[:3])}{more}); pixel metrics leave them out"
        )
    return PartFiles(name, root, kept, max_pixels, tuple(notes))


def _ends_with(parts: tuple[str, ...], ending: tuple[str, ...]) -> bool:
    return not ending or parts[-len(ending) :] == ending


def _stat(root: Path, path: str | None) -> tuple[int, int] | None:
    try:
        stat = (root / path).stat() if path is not None else None
    except (OSError, ValueError):  # missing, or no name of a file: a bad sample when it is read
        return None
    return stat and (stat.st_size, stat.st_mtime_ns)
