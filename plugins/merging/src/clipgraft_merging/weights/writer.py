"""safetensors written tensor by tensor: the header first, then each tensor at its place, whole or absent at the end."""

from __future__ import annotations

import json
import os
import shutil
import struct
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from clipgraft.errors import ClipgraftError
from clipgraft_merging.weights.stores import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsWriter:
    """A context that replaces ``path`` when every tensor of ``entries`` {name: (shape, dtype)} was written.

    Leaving it by an exception, or killing the process, leaves what was at ``path`` as it was. Tensors come in any order
    and may be written again; memory is that of the tensor at hand.
    """

    def __init__(
        self, path: Path, entries: Mapping[str, tuple[tuple[int, ...], torch.dtype]], metadata: Mapping[str, str] = {}
    ) -> None:
        self.path, self.entries = Path(path), dict(entries)
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
        self._offsets: dict[str, int] = {}
        end = 0
        # wide types first keeps every tensor aligned to its own width, as readers of safetensors expect
        for name in sorted(self.entries, key=lambda n: (-self.entries[n][1].itemsize, n)):
            shape, dtype = self.entries[name]
            size = dtype.itemsize * torch.Size(shape).numel()
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
            self._offsets[name] = end
            end += size
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._head = struct.pack("<Q", len(text)) + text
        self.nbytes = len(self._head) + end
        self._missing = set(self.entries)
        self._draft = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex[:8]}.tmp")

    def __enter__(self) -> SafetensorsWriter:
        free = shutil.disk_usage(self.path.parent).free
        if free < self.nbytes:
            sizes = f"{self.nbytes / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free"
            raise ClipgraftError(f"{self.path} doesn't fit on its disk: {sizes}; make room or choose another folder")
        self._file = self._draft.open("wb")  # an ordinary open, so that the umask decides who may read
        try:
            self._file.write(self._head)
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Put ``tensor`` in its place; ``ValueError`` when it isn't what the header says."""
        if (tuple(tensor.shape), tensor.dtype) != self.entries[name]:
            raise ValueError(f"{name}: {tuple(tensor.shape)} {tensor.dtype} instead of {self.entries[name]}")
        self._file.seek(len(self._head) + self._offsets[name])
        self._file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        self._missing.discard(name)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                if self._missing:
                    raise ValueError(f"{min(self._missing)} was never written ({len(self._missing)} such)")
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                self._draft.replace(self.path)
        finally:
            self._discard()

    def _discard(self) -> None:
        with suppress(OSError):  # a full disk refuses the rest of the buffer a second time
            self._file.close()
        self._draft.unlink(missing_ok=True)
