"""Where the members of tar shards lie, found in one pass over the headers; contents stay where they are.

A row per sample, in numpy columns (some 60 bytes each, with the keys), so that the index of a large set stays small.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clipgraft.errors import InputError
from clipgraft.log import Bar

IMAGES = ("jpg", "jpeg", "png", "webp")
"""Members that are images, in the order in which they are looked for."""
KINDS = ("image", "txt", "json", "cls")
BLOCK, RECORD = 512, 10240
LARGEST_LABEL = 4096
"""Bytes of a .cls member that are read at most."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar file as it was when it was indexed."""

    path: Path
    bytes: int
    mtime_ns: int


@dataclass(slots=True)
class Group:
    """The members of one sample: {suffix: (offset, size)}."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    label: str | None = None

    def image(self) -> str:
        """The suffix of its image; "" without one."""
        return next((suffix for suffix in IMAGES if suffix in self.members), "")


@dataclass(slots=True)
class Index:
    """Samples over all shards: ``at[kind]`` (n, 2) int64 offset and size, size -1 for a kind that a sample lacks."""

    shards: list[Shard]
    shard: NDArray[np.int32]
    keys: list[str]
    suffix: NDArray[np.int8]
    at: dict[str, NDArray[np.int64]]
    labels: list[str | None]


def build(paths: list[Path], *, name: str, keep_truncated: bool, bar: Bar) -> Index:
    """One pass over the headers of every shard; ``bar`` advances by shards."""
    shards, number, keys, suffix, labels = list[Shard](), list[int](), list[str](), list[int](), list[str | None]()
    at: dict[str, list[tuple[int, int]]] = {kind: [] for kind in KINDS}
    for path in paths:
        stat = path.stat()
        for group in _samples(path, stat.st_size, name=name, keep_truncated=keep_truncated):
            number.append(len(shards))
            keys.append(group.key)
            labels.append(group.label)
            image = group.image()
            suffix.append(IMAGES.index(image) if image else -1)
            for kind in KINDS:
                at[kind].append(group.members.get(image if kind == "image" else kind, (0, -1)))
        shards.append(Shard(path, stat.st_size, stat.st_mtime_ns))
        bar.advance(note=f"{len(keys)} samples")
    columns = {kind: np.array(rows, dtype=np.int64).reshape(-1, 2) for kind, rows in at.items()}
    return Index(shards, np.array(number, np.int32), keys, np.array(suffix, np.int8), columns, labels)


def _samples(path: Path, size: int, *, name: str, keep_truncated: bool) -> Iterator[Group]:
    """The samples of one shard. A cut shard raises unless ``keep_truncated``; then those that are whole come."""
    groups, cut = _groups(path, size, name=name)
    if cut and groups and not _whole(groups):
        groups.pop()
    if cut and not keep_truncated:
        raise InputError(
            f"{name}: {path.name} is {cut}; {len(groups)} samples before that are whole. Get the shard again, or take "
            "those with ?truncated=keep"
        )
    yield from groups


def _groups(path: Path, size: int, *, name: str) -> tuple[list[Group], str]:
    """Members grouped by key, and how the shard is damaged if it is."""
    from webdataset.tariterators import base_plus_ext

    groups, seen = list[Group](), set[str]()
    try:
        with tarfile.open(path, "r:") as tar:
            while True:
                member = tar.next()
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
                if member is None:
                    break
                _refuse(member, where=f"{name}: {path.name}")
                if not member.isreg():
                    continue
                key, suffix = base_plus_ext(member.name.removeprefix("./"))
                if key is None or key.rpartition("/")[2].startswith("__"):
                    continue
                if not groups or groups[-1].key != key:
                    if key in seen:
                        raise InputError(
                            f"{name}: {path.name}: the files of sample {key!r} are apart; a shard holds them one after "
                            "the other (write it with tar --sort=name)"
                        )
                    seen.add(key)
                    groups.append(Group(key))
                if (suffix := suffix.lower()) in groups[-1].members:
                    raise InputError(f"{name}: {path.name}: sample {key!r} has two .{suffix} files; remove one")
                if member.offset_data + member.size > size:
                    groups[-1].members.clear()
                    return groups, f"cut off inside {member.name}"
                groups[-1].members[suffix] = member.offset_data, member.size
                if suffix == "cls":
                    groups[-1].label = _label(tar, member, where=f"{name}: {path.name}")
            stopped = tar.offset
    except (tarfile.TarError, EOFError) as error:
        if not groups:
            raise InputError(
                f"{name}: {path.name} is no plain tar file ({error}); unpack .gz first, or get it again"
            ) from None
        return groups, f"damaged ({error})"
    with path.open("rb") as file:
        file.seek(stopped)
        block, padding = file.read(BLOCK), file.read(RECORD)
    if len(block) < BLOCK:
        return groups, "cut off (it has no end mark)"
    if not any(block) and any(padding):
        raise InputError(f"{name}: {path.name} holds several archives in a row; unpack them and write one")
    return groups, f"damaged at byte {stopped}" if any(block) else ""


def _whole(groups: list[Group]) -> bool:
    """Whether the last sample of a cut shard has every kind of file that the one before it has."""
    return len(groups) > 1 and groups[-2].members.keys() <= groups[-1].members.keys()


def _refuse(member: tarfile.TarInfo, *, where: str) -> None:
    """Members that no data set needs and an attack may: outside paths, links, devices."""
    if member.name.startswith(("/", "\\")) or ".." in member.name.replace("\\", "/").split("/"):
        raise InputError(f"{where}: refused, member {member.name!r} leaves the archive; don't use this file")
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise InputError(f"{where}: refused, member {member.name!r} is no plain file; write shards of plain files")


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, *, where: str) -> str | None:
    file = tar.extractfile(member)
    assert file is not None
    try:
        return file.read(LARGEST_LABEL).decode().strip() or None
    except UnicodeDecodeError:
        raise InputError(f"{where}: {member.name} is not UTF-8 text; expected a class name or number") from None
