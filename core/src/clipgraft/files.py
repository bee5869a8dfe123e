"""Writes that are whole or absent: temporary name, fsync, rename; a manifest of hashes that reading verifies."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clipgraft.errors import ClipgraftError

MANIFEST = "manifest.json"


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in one rename."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` by ``value`` as indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Contiguous copies of ``tensors`` as safetensors with the permissions that other files get (not 0600)."""
    from safetensors.torch import save_file

    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, path, {"format": "pt", **(metadata or {})})
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def clean(parent: Path) -> None:
    """Put back or remove what a killed writer left in ``parent``."""
    for old in parent.glob(".*.old"):
        target = parent / old.name[1 : -len(".old")]
        old.rename(target) if not target.exists() else shutil.rmtree(old, ignore_errors=True)
    for leftover in parent.glob(".*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary sibling to fill; on success it gets a manifest, is synced and takes the place of ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    clean(path.parent)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        seal(temporary)
        old = path.with_name(f".{path.name}.old")
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        _sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise ClipgraftError(f"can't write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def seal(folder: Path) -> None:
    """Write the manifest (size and sha256 of every file) and sync everything."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    entries = {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in files}
    write_json(folder / MANIFEST, {"files": entries})
    for p in files:
        _sync(p)
    _sync(folder)


def verify(folder: Path) -> None:
    """Raise when a file of the manifest is missing or damaged."""
    try:
        entries = json.loads((folder / MANIFEST).read_text("utf-8"))["files"]
    except (OSError, ValueError, KeyError) as error:
        raise ClipgraftError(f"{folder} has no readable {MANIFEST}; it was not written to the end") from error
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"] or sha256_of(path) != entry["sha256"]:
            raise ClipgraftError(f"{path} is missing or damaged (it does not match {MANIFEST})")


def is_whole(folder: Path) -> bool:
    """Whether ``folder`` passes ``verify``."""
    try:
        verify(folder)
    except ClipgraftError:
        return False
    return True


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
