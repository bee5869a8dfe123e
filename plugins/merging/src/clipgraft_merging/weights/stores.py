"""Raw tensors of a checkpoint: in safetensors files, read when asked, or in memory."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from clipgraft.errors import InputError
from clipgraft.files import sha256_of, tensors_digest

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Entry(NamedTuple):
    """What a header says of a tensor: its file, and the byte at which it starts there."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path | None = None
    start: int = 0


class Store(Protocol):
    """Tensors by their raw names. ``aliases`` are second names of tensors that the file holds once."""

    entries: Mapping[str, Entry]
    aliases: Mapping[str, str]

    def read(self, name: str) -> Tensor:
        """The tensor in its own dtype."""

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        """Its numbers ``start`` to ``stop`` in row-major order, flat."""

    @property
    def sha256(self) -> str:
        """Hex digest of what is stored."""


class FileStore:
    """One safetensors file or the shards of one model. Headers are checked at once, tensors are read when asked.

    safetensors checks the file; the bytes are then read, not mapped, so that no page of it stays resident and a file
    that somebody truncates meanwhile is an error and not a bus error.
    """

    def __init__(self, files: Sequence[Path], *, sha256: str = "") -> None:
        self.files, self._sha256 = list(files), sha256
        self.entries: dict[str, Entry] = {}
        self.aliases: dict[str, str] = {}
        for file in self.files:
            for name, entry in _header(file).items():
                if name == "__metadata__":
                    self.aliases |= entry
                    continue
                if name in self.entries:
                    raise InputError(f"{file} and {self.entries[name].file} both hold {name}; fetch the model again")
                self.entries[name] = entry
        # safetensors' save_model notes {second name: stored name} among the metadata
        self.aliases = {k: v for k, v in self.aliases.items() if v in self.entries and k not in self.entries}

    def read(self, name: str) -> Tensor:
        """The tensor in its own dtype, freshly read."""
        shape = self.entries[name].shape
        return self.piece(name, 0, math.prod(shape)).view(shape)

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        """(stop - start,) numbers of the tensor in row-major order, freshly read."""
        _, dtype, file, at = self.entries[name]
        assert file is not None
        found = torch.empty(stop - start, dtype=dtype)
        buffer = memoryview(found.view(torch.uint8).numpy())
        done = 0
        try:
            with file.open("rb", buffering=0) as handle:
                handle.seek(at + start * dtype.itemsize)
                while done < len(buffer) and (read := handle.readinto(buffer[done:])):  # 2 GB at a time on Linux
                    done += read
        except OSError as error:
            raise InputError(f"{name} of {file} can't be read: {error}; fetch the file again") from None
        if done < len(buffer):
            raise InputError(f"{file} ends within {name}: it was cut short after it had been opened; fetch it again")
        return found

    @cached_property
    def sha256(self) -> str:
        """Of the file; of several files, of their digests in order."""
        digests = [sha256_of(file) for file in self.files] if not self._sha256 else [self._sha256]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


class MemoryStore:
    """Tensors of an encoder that only its own code can open."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = {name: tensor.detach() for name, tensor in state.items()}
        self.entries = {name: Entry(tuple(t.shape), t.dtype) for name, t in self.state.items()}
        self.aliases: dict[str, str] = {}

    def read(self, name: str) -> Tensor:
        """The tensor itself; what it returns must not be changed."""
        return self.state[name]

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        """A view of its numbers ``start`` to ``stop``."""
        return self.state[name].flatten()[start:stop]

    @cached_property
    def sha256(self) -> str:
        """Of names, shapes, types and bytes."""
        return tensors_digest(self.state)


def _header(file: Path) -> dict[str, Any]:
    """{name: entry} and {"__metadata__": ...} of a file that safetensors found to be whole."""
    from safetensors import safe_open

    if not file.is_file():
        raise InputError(f"the weights file {file} is missing")
    try:
        with safe_open(file, framework="pt"):  # checks sizes, offsets and that nothing is missing or left over
            pass
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            header = json.loads(handle.read(length))
    except Exception as error:
        raise InputError(
            f"{file} is truncated, damaged or no safetensors file: {_line(error)}; fetch it again"
        ) from None
    found: dict[str, Any] = {"__metadata__": header.pop("__metadata__", {})}
    for name, entry in header.items():
        if (dtype := DTYPES.get(entry["dtype"])) is None:
            raise InputError(f"{file}: {name} is stored as {entry['dtype']}, which can't be merged; use fp32")
        found[name] = Entry(tuple(entry["shape"]), dtype, file, 8 + length + entry["data_offsets"][0])
    return found


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
