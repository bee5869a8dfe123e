"""Writes that are whole or absent: temporary name, fsync, rename; a manifest of hashes that reading verifies."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipgraft.errors import ClipgraftError, InputError

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"


def parse_json(text: str | bytes) -> Any:
    """JSON from outside; ``ValueError`` for what is none, also for what is nested too deep."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def check_path(text: str, *, origin: str = "") -> None:
    """``InputError`` for what no file system takes as a path, so that looking at it later can't fail otherwise."""
    try:
        longest = max(len(os.fsencode(part)) for part in re.split(r"[/{},]|::", text))  # shards are named so
        home = os.path.expanduser(text)
    except UnicodeEncodeError:
        longest, home = 0, "~"
    if longest > 255 or len(text) > 4000 or "\0" in text or home.startswith("~"):
        raise InputError(f"{origin or 'the path'} {text!r:.80} can't be a path; give one that exists")


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Hex sha256 of names, shapes, types and bytes, in the order of the names: equal weights, equal digest."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in one rename."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content`` in one rename."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` by ``value`` as indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, *, dtype: Any = None
) -> None:
    """safetensors on the CPU, contiguous and without shared memory; floating tensors cast to ``dtype`` if given."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    ready, seen = {}, set[int]()
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        storage = tensor.untyped_storage().data_ptr()
        ready[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    try:
        save_file(ready, path, {"format": "pt", **(metadata or {})})
    except SafetensorError as error:  # a full disk, seen from Rust
        raise OSError(f"{path}: {' '.join(str(error).split())}") from error
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)  # safetensors writes files that only their owner can read


def check_tensors(file: Path) -> None:
    """``InputError`` unless the header of a safetensors file fits what follows it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} is no safetensors file and was not loaded: {' '.join(str(error).split())}") from None


@contextmanager
def whole_folder(target: Path, *, marker: str | None = None) -> Iterator[Path]:
    """Fill the folder that this yields; it takes the place of ``target`` when the block ends without an error.

    It gets a manifest of sizes and hashes, unless ``marker`` names a file that the block writes for that purpose; then
    an existing folder is replaced only when it is empty or holds ``marker``.
    """
    target = Path(os.path.abspath(target))
    if (
        marker
        and target.exists()
        and not (target / marker).is_file()
        and (not target.is_dir() or any(target.iterdir()))
    ):
        raise InputError(f"{target} exists and holds no {marker}, so it is not replaced; choose another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    settle(target)
    draft, old = (target.with_name(f".{target.name}.{kind}-{os.getpid()}") for kind in ("new", "old"))
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        yield draft
        if marker is None:
            _write_manifest(draft)
        for file in [*draft.rglob("*"), draft]:
            _sync(file)
        if target.exists():
            target.rename(old)
        draft.rename(target)
        with suppress(OSError):  # it has taken its place: to fail now would say that the old one is there
            _sync(target.parent)
    except OSError as error:
        raise ClipgraftError(f"{target} could not be written: {error}; the old one, if any, is unchanged") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove ``folder``, if it is there, in one rename: no part of it is ever seen under its name."""
    settle(folder)
    gone = folder.with_name(f".{folder.name}.new-{os.getpid()}")
    with suppress(OSError):
        folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def settle(target: Path) -> None:
    """Clean up after writers that died: put a half-replaced folder back, remove drafts."""
    for left in [*target.parent.glob(f".{target.name}.old-*"), *target.parent.glob(f".{target.name}.new-*")]:
        if _alive(left):
            continue
        if ".old-" in left.name and not target.exists():
            left.rename(target)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _alive(path: Path) -> bool:
    """Whether another process that made this temporary still runs."""
    try:
        owner = int(path.name.rpartition("-")[2])
        os.kill(owner, 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return owner != os.getpid()


def _write_manifest(folder: Path) -> None:
    """Size and sha256 of every file."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    entries = {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in files}
    write_json(folder / MANIFEST, {"files": entries})


def verify(folder: Path) -> None:
    """Raise when a file of the manifest is missing or damaged."""
    try:
        entries = parse_json((folder / MANIFEST).read_bytes())["files"]
        expected = {folder / name: (entry["bytes"], entry["sha256"]) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ClipgraftError(f"{folder} has no readable {MANIFEST}; it was not written to the end") from error
    for path, (size, sha256) in expected.items():
        if not path.is_file() or path.stat().st_size != size or sha256_of(path) != sha256:
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
