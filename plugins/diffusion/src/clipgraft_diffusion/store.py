"""Latents on disk, computed once for images that every epoch and every run crops alike.

A folder holds one cache per (source, generator, settings), in a subfolder named by their digest: ``about.json`` says
them, ``NNNNNNNNN.safetensors`` are shards of ``ROWS`` places of the source in order, with the samples' ids. Every file
is written under another name first, so that whatever stops, and however many processes fill at once, what is there is
whole; a run that finds shards computes the missing ones alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from clipgraft import distributed, files
from clipgraft.config.schema import TrainConfig
from clipgraft.data.base import Source
from clipgraft.data.loader import BadSamples, evaluation_batches, stack_images
from clipgraft.encoders.base import Preprocess
from clipgraft.errors import ClipgraftError, InputError
from clipgraft.log import RunLog
from clipgraft_diffusion.source import Part

Precision = Literal["fp32", "fp16"]
Compute = Callable[[Tensor], Tensor]
"""Pixels (b, 3, H, W') in [0, 1], on the CPU -> rows (b, ...)."""
ROWS = 1024
OPEN = 32
"""Shards that are open at a time."""
STORED = {"fp32": torch.float32, "fp16": torch.float16}


def about(
    source: Source, generator: nn.Module, *, precision: Precision, size: tuple[int, int], **settings: object
) -> dict[str, str]:
    """What decides the numbers: the crops, the generator's tensors, and its settings."""
    known = {"source": source.fingerprint, "generator": files.tensors_digest(generator.state_dict())}
    known |= {"precision": precision, "size": f"{size[0]} x {size[1]}"}
    return known | {key: str(value) for key, value in settings.items()}


def chunk(train: TrainConfig) -> int:
    """Samples that one forward of a stage sees: latents of equal batches are equal to the bit."""
    return train.batch_size // (train.accumulate * distributed.world_size())


class LatentStore:
    """The cache under ``folder`` for what ``about`` says; other caches there are named, not read.

    Called like ``Remembered``: ids of B samples -> rows (B, ...) in fp32, or int64 for codes, on the CPU.
    """

    def __init__(self, folder: Path, about: Mapping[str, str], *, log: RunLog) -> None:
        self.about, self.log = dict(about), log
        digest = hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()
        self.root, self.folder = folder, folder / digest[:16]
        self._rows: dict[str, tuple[Path, int]] = {}
        self._open: dict[Path, Any] = {}

    def fill(
        self, source: Source, compute: Compute, *, preprocess: Preprocess, batch_size: int, workers: int = 0
    ) -> None:
        """Compute every shard of ``source`` that is missing, each process its share, then read the ids of all."""
        self._begin()
        starts = range(0, len(source), ROWS)
        mine = starts[distributed.rank() :: distributed.world_size()]
        missing = [start for start in mine if not self._is_whole(self._shard(start))]
        count = sum(min(ROWS, len(source) - start) for start in missing)
        if count:
            with self.log.progress("computing latents", count) as bar:
                for start in missing:
                    place = range(start, min(start + ROWS, len(source)))
                    if not _is_readable(self._shard(start)):  # another run may have been here meanwhile
                        rows = self._computed(Part(source, place), compute, preprocess, batch_size, workers)
                        self._write(self._shard(start), *rows)
                    bar.advance(len(place))
        distributed.barrier()
        for start in starts:
            with safe_open(self._shard(start), "pt") as shard:
                ids = json.loads(shard.metadata()["ids"])
            self._rows |= {name: (self._shard(start), row) for row, name in enumerate(ids)}
        size = sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))
        self.log.info(f"latents of {len(self._rows)} images in {self.folder} ({size / 1e6:.1f} MB), {count} new here")

    def __call__(self, ids: Sequence[str], compute: Callable[[], Tensor]) -> Tensor:
        """Rows of the samples; a batch with an unknown one is computed."""
        if any(name not in self._rows for name in ids):
            return compute()
        found = torch.stack([self._read(*self._rows[name]) for name in ids])
        return found.float() if found.is_floating_point() else found.long()

    # -- files ---------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / "about.json").exists():
                files.write_json(self.folder / "about.json", self.about)
        except OSError as error:
            raise InputError(
                f"latents can't be kept in {self.root}: {error.strerror}; name a writable folder"
            ) from None
        for other in sorted(self.root.glob("*/about.json")):
            if other.parent == self.folder:
                continue
            try:
                told = json.loads(other.read_text("utf-8"))
                differs = [key for key in {**self.about, **told} if told.get(key) != self.about.get(key)]
            except (OSError, ValueError, AttributeError):
                continue
            size = sum(file.stat().st_size for file in other.parent.glob("*.safetensors"))
            self.log.info(
                f"latents in {other.parent} ({size / 1e6:.1f} MB) are of another {', '.join(differs)} and are not "
                "read; delete that folder if nothing else needs it"
            )

    def _shard(self, start: int) -> Path:
        return self.folder / f"{start:09d}.safetensors"

    def _is_whole(self, path: Path) -> bool:
        if _is_readable(path):
            return True
        if path.exists():
            self.log.info(f"{path} is damaged and computed again")
        return False

    def _computed(
        self, part: Source, compute: Compute, preprocess: Preprocess, batch_size: int, workers: int
    ) -> tuple[list[str], Tensor]:
        ids, rows = [], []
        for items in evaluation_batches(
            part, preprocess=preprocess, batch_size=batch_size, bad=BadSamples(len(part)), workers=workers
        ):
            found = compute(stack_images(items)).detach().cpu()
            kept = found.to(STORED[self.about["precision"]] if found.is_floating_point() else torch.int32)
            if found.is_floating_point() and not kept.isfinite().all():
                raise InputError("these latents are too large for fp16; set the cache's precision to fp32")
            rows.append(kept)
            ids += [item.id for item in items]
        return ids, torch.cat(rows) if rows else torch.empty(0)

    def _write(self, path: Path, ids: list[str], rows: Tensor) -> None:
        draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            files.write_tensors(draft, {"rows": rows}, {"ids": json.dumps(ids)})
            with draft.open("rb+") as file:
                os.fsync(file.fileno())
            draft.replace(path)
        except (OSError, SafetensorError) as error:
            raise ClipgraftError(f"{path} could not be written: {error}; free space or name another folder") from None
        finally:
            draft.unlink(missing_ok=True)

    def _read(self, path: Path, row: int) -> Tensor:
        if path not in self._open:
            if len(self._open) >= OPEN:
                del self._open[next(iter(self._open))]
            shard: Any = safe_open(path, "pt")
            self._open[path] = shard.__enter__().get_slice("rows")  # the mapping lives as long as the slice
        found: Tensor = self._open[path][row]
        return found


def _is_readable(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as shard:
            return "ids" in (shard.metadata() or {}) and "rows" in shard.keys()  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError):
        return False
