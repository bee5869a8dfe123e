"""Features on disk, under a hash of all that they follow from: weights, preprocessing and data, never a path.

An entry is a folder of ``tensors.safetensors`` and ``items.json`` with a manifest of hashes. It appears whole or not at
all; a damaged one counts as absent. Any entry may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from clipgraft import files
from clipgraft.data.base import Pair, Sample
from clipgraft.data.reading import GONE
from clipgraft.encoders.base import EncoderData
from clipgraft.errors import ClipgraftError, InputError

FORMAT = 1
"""Part of every key: raise it when what an entry holds changes."""
TENSORS, ITEMS = "tensors.safetensors", "items.json"


@dataclass(frozen=True, slots=True)
class Entry:
    """Tensors by name, and what is known about their rows."""

    tensors: dict[str, Tensor]
    items: Any = None


@dataclass(frozen=True, slots=True)
class FeatureCache:
    """Entries below ``folder``, which is made when the first one is written."""

    folder: Path

    def __post_init__(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"{self.folder} is a file; the cache of features needs a folder")

    def read(self, key: str) -> Entry | None:
        """What was written under ``key``; None when it isn't there or isn't whole."""
        folder = self._place(key)
        if not folder.is_dir() or not files.is_whole(folder):
            return None
        try:
            return Entry(load_file(folder / TENSORS), json.loads((folder / ITEMS).read_text("utf-8")))
        except (OSError, ValueError, SafetensorError):
            return None

    def write(self, key: str, entry: Entry) -> str:
        """Keep an entry. Returns why that was not possible, or nothing: results don't depend on it."""
        try:
            with files.whole_folder(self._place(key)) as new:
                files.write_tensors(new / TENSORS, entry.tensors)
                (new / ITEMS).write_text(json.dumps(entry.items, default=lambda value: value.item()), "utf-8")
        except (OSError, ValueError, AttributeError, SafetensorError, ClipgraftError) as error:
            return str(error).splitlines()[0]
        return ""

    def _place(self, key: str) -> Path:
        return self.folder / key[:2] / key


def key_of(*parts: Any) -> str:
    """Hex digest of plain values and bytes."""
    digest = hashlib.sha256(f"clipgraft features {FORMAT}".encode())
    for part in parts:
        content = part if isinstance(part, bytes) else repr(part).encode("utf-8", "backslashreplace")
        digest.update(f"/{len(content)}/".encode())
        digest.update(content)
    return digest.hexdigest()


def tower_digest(tower: nn.Module, data: EncoderData) -> str:
    """Hex digest of what a tower computes: its tensors, structure and grafts.

    The structure matters: QuickGELU and GELU have equal tensors.
    """
    digest = hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", repr(tower)).encode())
    grafts = [(graft.name, graft.config) for graft in data.grafts]
    digest.update(json.dumps([data.model_config, grafts], sort_keys=True, default=str).encode())
    digest.update(files.tensors_digest(tower.state_dict()).encode())
    return digest.hexdigest()


def to_records(items: Sequence[Sample | Pair]) -> list[dict[str, Any]]:
    """Everything but images and ``extra``, as JSON holds it."""
    return [{f.name: getattr(i, f.name) for f in fields(i) if f.name not in LEFT_OUT} for i in items]


def from_records(records: Sequence[Mapping[str, Any]]) -> list[Sample | Pair]:
    """The inverse of ``to_records``."""
    rows = [{name: _tuples(value) for name, value in record.items()} for record in records]
    return [Pair(images=(GONE, GONE), **row) if "pattern" in row else Sample(image=GONE, **row) for row in rows]


LEFT_OUT = ("image", "images", "extra")


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
