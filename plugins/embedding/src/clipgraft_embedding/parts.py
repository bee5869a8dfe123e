"""A working folder of parts, each whole or absent, that an interrupted command finds again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clipgraft.errors import ClipgraftError, InputError
from clipgraft.files import write_json, write_tensors
from clipgraft_embedding.tower import Kind, Precision

Dtype = Literal["fp32", "fp16"]
STORED = {"fp32": torch.float32, "fp16": torch.float16}
SAME = {
    "kind": "what to embed", "tower_sha256": "the model's weights", "fingerprint": "the data",
    "preprocess": "the model's preprocessing", "precision": "--precision", "dtype": "--dtype",
    "batch_size": "--batch-size", "shard_size": "--shard-size",
}  # fmt: skip
"""What must be equal for two runs to have the same result, in the words of the command line."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What the rows of a file depend on. ``model`` and ``source`` are references as they were given."""

    kind: Kind
    model: str
    tower_sha256: str
    source: str
    fingerprint: str
    preprocess: Mapping[str, Any]
    total: int
    precision: Precision
    dtype: Dtype
    batch_size: int
    shard_size: int

    def difference(self, other: Mapping[str, Any]) -> str:
        """The first thing that ``other`` (from JSON) has and is different, in words; empty when nothing is."""
        own = json.loads(json.dumps(asdict(self)))
        return next((words for key, words in SAME.items() if key in other and other[key] != own[key]), "")


@dataclass
class PartRows:
    """Rows of one part: unit ``embeddings`` (m, D) and what is known about each."""

    embeddings: list[Tensor] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    labels: list[int | None] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)


class Parts:
    """The folder ``.NAME.parts`` beside the file NAME. One command at a time, over all its processes, may fill it."""

    def __init__(self, out: Path) -> None:
        self.folder = out.with_name(f".{out.name}.parts")
        self._lock: int | None = None

    def __enter__(self) -> Self:
        """Make the folder and take its lock, which the system gives back when this process ends in whatever way."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            import fcntl
        except ImportError:  # no such locks on Windows
            return self
        self._lock = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise InputError(f"another process is filling {self.folder} right now; wait for it, or end it") from None
        except OSError:  # a file system without locks
            pass
        return self

    def __exit__(self, *error: object) -> None:
        if not (self.folder / "plan.json").exists():  # nothing was begun
            self.remove()
        if self._lock is not None:
            os.close(self._lock)

    def plan(self) -> dict[str, Any]:
        """What the folder was begun for; empty when there is nothing to continue."""
        try:
            found = json.loads((self.folder / "plan.json").read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def begin(self, plan: Plan) -> None:
        """Start anew."""
        for file in self.folder.iterdir():
            if file.name != "lock":
                file.unlink()
        write_json(self.folder / "plan.json", asdict(plan))

    def missing(self, count: int) -> list[int]:
        """The parts of ``count`` that are still to be made."""
        return [part for part in range(count) if not _is_whole(self.path(part))]

    def path(self, part: int) -> Path:
        """Where a part is."""
        return self.folder / f"part-{part:06d}.safetensors"

    def write(self, part: int, rows: PartRows, *, dim: int, dtype: Dtype) -> None:
        """Make a part appear as a whole."""
        embeddings = torch.cat(rows.embeddings) if rows.embeddings else torch.empty(0, dim)
        tensors = {
            "embeddings": embeddings.to(STORED[dtype]),
            "ids": as_bytes(rows.ids),
            "labels": torch.tensor([-1 if label is None else label for label in rows.labels], dtype=torch.int64),
            "captions": as_bytes(rows.captions),
            "bad": as_bytes(rows.bad),
        }
        draft = self.folder / f"part-{part:06d}.tmp"
        try:
            write_tensors(draft, tensors)
            with draft.open("rb") as file:
                os.fsync(file.fileno())
            draft.replace(self.path(part))
        except (OSError, SafetensorError) as error:
            raise ClipgraftError(f"{self.path(part)} could not be written: {error}; what is there is kept") from error

    def remove(self) -> None:
        """The file is written; nothing is left to continue."""
        shutil.rmtree(self.folder, ignore_errors=True)


def as_bytes(values: Sequence[str]) -> Tensor:
    """Texts -> uint8: their JSON array in UTF-8."""
    return torch.frombuffer(
        bytearray(json.dumps(values, ensure_ascii=False).encode("utf-8", "replace")), dtype=torch.uint8
    )


def from_bytes(tensor: Tensor) -> list[str]:
    """The inverse of ``as_bytes``."""
    values: list[str] = json.loads(tensor.numpy().tobytes())
    return values


def _is_whole(path: Path) -> bool:
    """Whether the file's header fits its size; safetensors checks that when it opens one."""
    try:
        with safe_open(path, "pt") as file:
            return "embeddings" in file.keys()  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError):
        return False
