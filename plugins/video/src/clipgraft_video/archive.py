"""Videos inside an uncompressed tar, read where they lie: nothing is unpacked.

A member is a path that goes through the archive: ``clips.tar/walk/a.mp4``. Links, devices and names that would leave
the archive don't exist here.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from clipgraft.errors import InputError

SUFFIX = ".tar"


@dataclass(frozen=True, slots=True)
class Member:
    """``size`` bytes of ``archive`` from ``start`` on; ``changed`` is the time that the archive tells [s]."""

    archive: Path
    start: int
    size: int
    changed: int

    def open(self) -> BinaryIO:
        """A stream of its bytes that can be searched."""
        return cast(BinaryIO, io.BufferedReader(_Window(self)))

    def read(self) -> bytes:
        """All of its bytes."""
        with self.open() as stream:
            return stream.read()


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, member: Member) -> None:
        super().__init__()
        self._file, self._member, self._at = member.archive.open("rb"), member, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._member.size}[whence]
        if base + offset < 0:
            raise OSError("a place before the beginning")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        count = max(min(len(view), self._member.size - self._at), 0)
        self._file.seek(self._member.start + self._at)
        found = self._file.readinto(view[:count]) if count else 0
        self._at += found
        return found

    def close(self) -> None:
        self._file.close()
        super().close()


def is_archive(path: Path) -> bool:
    """A file that ends in .tar."""
    return path.suffix.lower() == SUFFIX and path.is_file()


@dataclass(frozen=True, slots=True)
class Index:
    """``files`` {name: member}; ``folders`` {folder, "." for the top: names of the files in it, sorted}."""

    files: Mapping[str, Member]
    folders: Mapping[str, Sequence[str]]


def index(archive: Path) -> Index:
    """What an archive holds; of two files with one name the last. Read once while the archive is unchanged."""
    found = archive.stat()
    return _index(archive, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=16)
def _index(archive: Path, size: int, changed: int) -> Index:
    files: dict[str, Member] = {}
    try:
        with tarfile.open(archive, "r:") as tar:
            for info in tar:
                parts = PurePosixPath(info.name).parts
                if info.isreg() and not info.issparse() and not info.name.startswith("/") and ".." not in parts:
                    files["/".join(parts)] = Member(archive, info.offset_data, info.size, int(info.mtime))
    except tarfile.ReadError:
        raise InputError(f"{archive.name} is no tar that can be read in place; pack it without compression") from None
    cut = next((name for name, m in files.items() if m.start + m.size > size), None)
    if cut is not None:
        raise InputError(f"{archive.name} is cut off inside {cut}; copy it again")
    folders: dict[str, list[str]] = {".": []}
    for name in sorted(files):
        *above, file = name.split("/")
        for depth in range(1, len(above) + 1):
            folders.setdefault("/".join(above[:depth]), [])
        folders["/".join(above) or "."].append(file)
    return Index(files, folders)


def split(path: Path) -> tuple[Path, str] | None:
    """The archive that ``path`` goes through, and the name inside; None for a path of the file system."""
    for parent in path.parents:
        if is_archive(parent):
            return parent, path.relative_to(parent).as_posix()
    return None


def member_of(path: Path) -> Member | None:
    """The file that ``path`` names inside an archive; None when it goes through none or names no file there."""
    where = split(path)
    return None if where is None else index(where[0]).files.get(where[1])


@contextmanager
def opened(path: Path) -> Iterator[Path | BinaryIO]:
    """What a decoder takes: the path itself, or a stream of a file inside an archive."""
    member = member_of(path)
    if member is None:
        yield path
    else:
        with member.open() as stream:
            yield stream


def inside(folder: Path) -> list[Path] | None:
    """The files of a folder inside an archive, not of those below it; None when ``folder`` is none."""
    where = split(folder)
    names = None if where is None else index(where[0]).folders.get(where[1])
    return None if names is None else [folder / name for name in names]


def is_folder(path: Path) -> bool:
    """A folder, on the disk or inside an archive."""
    return path.is_dir() or inside(path) is not None


def exists(path: Path) -> bool:
    """A file or folder, on the disk or inside an archive."""
    return path.exists() or member_of(path) is not None or is_folder(path)


def content(path: Path) -> bytes:
    """All bytes of a file, on the disk or inside an archive."""
    member = member_of(path)
    return path.read_bytes() if member is None else member.read()


def stamp(path: Path) -> tuple[int, int] | None:
    """Size [bytes] and time of change of what is there; None when nothing is."""
    if (member := member_of(path)) is not None:
        return member.size, member.changed
    if path.exists():
        found = path.stat()
        return found.st_size, found.st_mtime_ns
    files = inside(path)
    return None if files is None else (len(files), max((m.changed for f in files if (m := member_of(f))), default=0))


def walk(place: Path) -> Iterator[tuple[str, bool, list[str]]]:
    """Every folder below a folder or an archive: its path from there, whether it holds folders, its files, sorted."""
    if is_archive(place):
        known = index(place).folders
        parents = {folder.rpartition("/")[0] or "." for folder in known if folder != "."}
        for folder in sorted(known):
            if not any(part.startswith((".", "__")) for part in folder.split("/") if part != "."):
                yield folder, folder in parents, list(known[folder])
        return
    for here, folders, names in os.walk(place):
        folders[:] = sorted(f for f in folders if not f.startswith((".", "__")) and not Path(here, f).is_symlink())
        yield Path(here).relative_to(place).as_posix(), bool(folders), sorted(names)
