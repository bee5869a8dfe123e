"""Raw tensors of a checkpoint: in safetensors files, read when asked, or in memory."""

from __future__ import annotations

import hashlib
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
OPEN_FILES = 4
"""Shards kept open per checkpoint."""


class Entry(NamedTuple):
    """What a header says of a tensor, and the file it is in."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path | None


class Store(Protocol):
    """Tensors by their raw names. ``aliases`` are second names of tensors that the file holds once."""

    entries: Mapping[str, Entry]
    aliases: Mapping[str, str]

    def read(self, name: str) -> Tensor:
        """The tensor in its own dtype."""

    @property
    def sha256(self) -> str:
        """Hex digest of what is stored."""


class FileStore:
    """One safetensors file or the shards of one model. Headers are checked at once, tensors are read one at a time.

    Reading copies into memory of its own where safetensors can (0.8), so that nothing stays mapped and a file that
    somebody truncates meanwhile is an error and not a bus error.
    """

    def __init__(self, files: Sequence[Path], *, sha256: str = "") -> None:
        self.files, self._sha256 = list(files), sha256
        self._open: dict[Path, Any] = {}
        self.entries: dict[str, Entry] = {}
        self.aliases: dict[str, str] = {}
        for file in self.files:
            handle = self._handle(file)
            for name in handle.keys():  # noqa: SIM118  (not a dict)
                if name in self.entries:
                    raise InputError(f"{file} and {self.entries[name].file} both hold {name}; fetch the model again")
                part = handle.get_slice(name)
                if (dtype := DTYPES.get(part.get_dtype())) is None:
                    raise InputError(f"{file}: {name} is stored as {part.get_dtype()}, which can't be merged; use fp32")
                self.entries[name] = Entry(tuple(part.get_shape()), dtype, file)
            self.aliases |= dict(handle.metadata() or {})
        # safetensors' save_model notes {second name: stored name} among the metadata
        self.aliases = {k: v for k, v in self.aliases.items() if v in self.entries and k not in self.entries}

    def _handle(self, file: Path) -> Any:
        if (handle := self._open.get(file)) is not None:
            return handle
        if not file.is_file():
            raise InputError(f"the weights file {file} is missing")
        while len(self._open) >= OPEN_FILES:
            self._open.pop(next(iter(self._open)))
        self._open[file] = _opened(file)
        return self._open[file]

    def read(self, name: str) -> Tensor:
        """The tensor in its own dtype, freshly read."""
        file = self.entries[name].file
        assert file is not None
        try:
            return self._handle(file).get_tensor(name)  # type: ignore[no-any-return]
        except InputError:
            raise
        except Exception as error:  # SafetensorError, or OSError of the disk
            raise InputError(f"{name} of {file} can't be read: {_line(error)}; fetch the file again") from None

    @cached_property
    def sha256(self) -> str:
        """Of the file; of several files, of their digests in order."""
        digests = [sha256_of(file) for file in self.files] if not self._sha256 else [self._sha256]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


class MemoryStore:
    """Tensors of an encoder that only its own code can open."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = {name: tensor.detach() for name, tensor in state.items()}
        self.entries = {name: Entry(tuple(t.shape), t.dtype, None) for name, t in self.state.items()}
        self.aliases: dict[str, str] = {}

    def read(self, name: str) -> Tensor:
        """The tensor itself; what it returns must not be changed."""
        return self.state[name]

    @cached_property
    def sha256(self) -> str:
        """Of names, shapes, types and bytes."""
        return tensors_digest(self.state)


def _opened(file: Path) -> Any:
    from safetensors import safe_open

    try:
        try:
            return safe_open(file, framework="pt", backend="pread")
        except TypeError:  # before safetensors 0.8
            return safe_open(file, framework="pt")
    except Exception as error:
        raise InputError(
            f"{file} is truncated, damaged or no safetensors file: {_line(error)}; fetch it again"
        ) from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
