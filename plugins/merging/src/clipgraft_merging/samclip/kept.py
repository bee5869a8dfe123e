"""What a frozen teacher says about every picture, computed once and kept on disk, for streams without augmentation.

A folder holds one subfolder per (teacher, data, geometry), named by their digest: ``about.json`` says them, every
``NNNNNNNNN.safetensors`` holds ``ROWS`` places of the source with the samples' ids. Files are written under another
name first, so what is there is whole, whatever stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clipgraft import distributed, files
from clipgraft.data.base import BadSample, Source
from clipgraft.data.transforms import evaluation_transform
from clipgraft.encoders.base import Preprocess
from clipgraft.errors import ClipgraftError, InputError
from clipgraft.log import RunLog

Compute = Callable[[Tensor], Tensor]
"""Pixels (b, 3, H, W') in [0, 1], on the CPU -> rows (b, ...)."""
ROWS, OPEN = 1024, 32
"""Places per file; files that are open at a time."""


class Kept:
    """Rows of a teacher for what ``about`` says, below ``folder``. Call with ids of B samples -> (B, ...) fp32, CPU."""

    def __init__(self, folder: Path, about: Mapping[str, str], *, dtype: torch.dtype, log: RunLog) -> None:
        self.about, self.dtype, self.log = {**about, "dtype": str(dtype)}, dtype, log
        digest = hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()
        self.folder = folder / digest[:16]
        self._rows: dict[str, tuple[Path, int]] = {}
        self._open: dict[Path, Any] = {}

    def fill(self, source: Source, compute: Compute, *, preprocess: Preprocess, batch_size: int) -> None:
        """Compute the files that are missing, each process its share, then read the ids of all."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            files.write_json(self.folder / "about.json", self.about)
        except OSError as error:
            raise InputError(
                f"teacher features can't be kept in {self.folder}: {error.strerror}; name a writable cache.folder"
            ) from None
        transform, starts = evaluation_transform(preprocess), range(0, len(source), ROWS)
        mine = [s for s in starts[distributed.rank() :: distributed.world_size()] if not _whole(self._file(s))]
        with self.log.progress("teacher features", sum(min(ROWS, len(source) - s) for s in mine)) as bar:
            for start in mine:
                ids, rows = [], []
                for first in range(start, min(start + ROWS, len(source)), batch_size):
                    names, pixels = _read(source, range(first, min(first + batch_size, start + ROWS)), transform)
                    if pixels:
                        rows.append(compute(torch.stack(pixels)).detach().cpu().to(self.dtype))
                    ids += names
                    bar.advance(min(batch_size, len(source) - first))
                self._write(self._file(start), ids, torch.cat(rows) if rows else torch.zeros(0, 1))
        distributed.barrier()
        for start in starts:
            with safe_open(self._file(start), "pt") as file:
                names = json.loads(file.metadata()["ids"])
            self._rows |= {name: (self._file(start), row) for row, name in enumerate(names)}
        size = sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))
        self.log.info(f"teacher features of {len(self._rows)} pictures in {self.folder} ({size / 1e6:.1f} MB)")

    def __call__(self, ids: Sequence[str]) -> Tensor:
        """Rows of samples that ``fill`` read."""
        if unknown := next((name for name in ids if name not in self._rows), None):
            raise ClipgraftError(f"no teacher features are kept of {unknown!r}; remove {self.folder} and run again")
        return torch.stack([self._row(*self._rows[name]) for name in ids]).float()

    def _row(self, file: Path, row: int) -> Tensor:
        if file not in self._open:
            if len(self._open) >= OPEN:
                self._open.pop(next(iter(self._open)))
            self._open[file] = safe_open(file, "pt").get_slice("rows")
        return self._open[file][row]  # type: ignore[no-any-return]

    def _file(self, start: int) -> Path:
        return self.folder / f"{start:09d}.safetensors"

    @staticmethod
    def _write(path: Path, ids: Sequence[str], rows: Tensor) -> None:
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        try:
            files.write_tensors(temporary, {"rows": rows}, {"ids": json.dumps(list(ids))})
            os.replace(temporary, path)
        except OSError as error:
            raise ClipgraftError(f"{path} could not be written: {error.strerror}; free some space") from None
        finally:
            temporary.unlink(missing_ok=True)


def _whole(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return "ids" in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def _read(source: Source, places: range, transform: Callable[..., Tensor]) -> tuple[list[str], list[Tensor]]:
    ids, pixels = [], []
    for index in places:
        if index >= len(source):
            break
        try:
            sample = source[index]
        except BadSample:  # the training loader counts and replaces it
            continue
        ids.append(sample.id)
        pixels.append(transform(sample.image))
    return ids, pixels
