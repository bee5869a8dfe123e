"""What a frozen tower says of every training picture, computed once: epochs become text-only steps, exactly.

There is no augmentation, so features of a picture are constants. They stay in memory while they fit, and go to
safetensors shards in the run's folder otherwise.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from clipgraft import distributed, files
from clipgraft.data.base import BadSample, Sample, Source
from clipgraft.data.transforms import evaluation_transform
from clipgraft.encoders.base import Preprocess
from clipgraft.errors import InputError
from clipgraft.files import tensors_digest
from clipgraft.log import RunLog
from clipgraft_anomaly.inspection import mask_of, resized_mask

if TYPE_CHECKING:
    from clipgraft.runner import Run
    from clipgraft_anomaly.anomalyclip.config import CacheConfig
    from clipgraft_anomaly.reading import Reader

Keep = Literal["auto", "memory", "disk", "none"]
MEMORY = 2 * 2**30
"""Bytes of features that ``auto`` keeps in memory."""
SHARD = 32
INDEX = "index.json"

Produce = Callable[[Tensor], Mapping[str, Tensor]]
"""Pixels (b, 3, S, S) in [0, 1] -> tensors by name, each (b, ...)."""


@dataclass
class FeatureStore:
    """Tensors by name for pictures of ``source``, addressed by their place in ``rows`` (readable pictures).

    Beside what ``produce`` gives: ``mask`` (S, S) uint8, ``masked`` () whether it is known, ``label`` ().
    ``keep`` "none" computes everything anew in every call (the plain loop; for comparison).
    """

    source: Source
    produce: Produce
    preprocess: Preprocess
    folder: Path
    key: str
    keep: Keep = "auto"
    dtype: torch.dtype = torch.float32
    batch_size: int = 8
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rows: list[int] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    _memory: list[dict[str, Tensor]] = field(default_factory=list)
    _open: dict[int, Any] = field(default_factory=dict)

    def fill(self, log: RunLog) -> None:
        """Read every picture once; on disk, what an earlier process wrote for the same key is taken over."""
        self._transform = evaluation_transform(self.preprocess)
        known = self._written()
        if known is not None:
            self.rows, self.keep = known, "disk"
            return
        self.rows = []
        if self.keep == "none":
            self.rows = list(range(len(self.source)))
            return
        with log.progress("reading pictures", len(self.source)) as bar:
            pending: list[tuple[int, Sample]] = []
            for index in range(len(self.source)):
                try:
                    pending.append((index, self.source[index]))
                except BadSample as error:
                    self.bad.append(str(error))
                if len(pending) == self.batch_size or (pending and index + 1 == len(self.source)):
                    self._take(pending)
                    pending = []
                bar.advance()
        if not self.rows:
            raise InputError(f"{self.source.name} holds no readable picture; check data.from")
        if self.keep == "disk" and self._memory:
            self._spill(last=True)
        if self.keep == "disk":
            if distributed.rank() == 0:
                files.write_json(self.folder / INDEX, {"key": self.key, "rows": self.rows})
            distributed.barrier()
        elif self.keep == "auto":
            self.keep = "memory"

    def __len__(self) -> int:
        return len(self.rows)

    def __call__(self, places: Sequence[int]) -> dict[str, Tensor]:
        """Places in ``rows`` -> tensors (b, ...) on the device."""
        if self.keep == "none":
            found = self._compute([(self.rows[p], self.source[self.rows[p]]) for p in places])
        else:
            found = [self._memory[p] if self.keep == "memory" else self._from_disk(p) for p in places]
        return {
            name: torch.stack([row[name] for row in found]).to(self.device, self._kind(found[0][name]))
            for name in found[0]
        }

    @staticmethod
    def _kind(x: Tensor) -> torch.dtype:
        return torch.float32 if x.is_floating_point() else x.dtype

    def _take(self, pending: Sequence[tuple[int, Sample]]) -> None:
        self._memory += self._compute(pending)
        self.rows += [index for index, _ in pending]
        held = sum(t.nbytes for t in self._memory[-1].values()) * len(self.source)
        if self.keep == "auto" and held > MEMORY:
            self.keep = "disk"
        while self.keep == "disk" and len(self._memory) >= SHARD:
            self._spill(last=False)

    def _compute(self, items: Sequence[tuple[int, Sample]]) -> list[dict[str, Tensor]]:
        pixels = torch.stack([self._transform(sample.image) for _, sample in items])
        with torch.no_grad():
            found = self.produce(pixels.to(self.device))
        side, rows = pixels.shape[-1], []
        for place, (index, sample) in enumerate(items):
            mask = mask_of(self.source, index, sample)
            row = {name: x[place].to(self.dtype).cpu().clone() for name, x in found.items()}
            row["mask"] = torch.zeros(side, side, dtype=torch.uint8) if mask is None else resized_mask(mask, side)
            row["masked"] = torch.tensor(mask is not None)
            row["label"] = torch.tensor(int(sample.label or 0))
            rows.append(row)
        return rows

    # -- on disk -------------------------------------------------------------------------------------------------

    def _shard(self, number: int) -> Path:
        return self.folder / f"features-{number:05d}.safetensors"

    def _spill(self, *, last: bool) -> None:
        done = len(self.rows) - len(self._memory)
        part, self._memory = self._memory[:SHARD], self._memory[SHARD:]
        if distributed.rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            tensors = {f"{done + i}.{name}": x for i, row in enumerate(part) for name, x in row.items()}
            files.write_tensors(self._shard(done // SHARD), tensors)
        if last and self._memory:
            self._spill(last=True)

    def _written(self) -> list[int] | None:
        if self.keep in ("none", "memory") or not (self.folder / INDEX).is_file():
            return None
        found = json.loads((self.folder / INDEX).read_text("utf-8"))
        return list(found["rows"]) if found["key"] == self.key else None

    def _from_disk(self, place: int) -> dict[str, Tensor]:
        number = place // SHARD
        if number not in self._open:
            self._open[number] = safe_open(str(self._shard(number)), framework="pt")
        file, prefix = self._open[number], f"{place}."
        return {name[len(prefix) :]: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118


class Places:
    """The store's pictures as a source for the training loader: a place each, and no picture to decode."""

    def __init__(self, store: FeatureStore, *, size: tuple[int, int]) -> None:
        self.store, source = store, store.source
        self.name = source.name
        self.fingerprint = f"{source.fingerprint}[features]"
        self.classes, self.templates, self.attributes = source.classes, source.templates, source.attributes
        self._blank = torch.zeros(3, *size, dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> Sample:
        return Sample(id=str(self.store.rows[index]), image=self._blank, extra={"place": torch.tensor(index)})


DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def kept_features(
    run: Run, source: Source, reader: Reader, produce: Produce, cache: CacheConfig, *, stage: str, **key: object
) -> FeatureStore:
    """The filled store of what ``produce`` makes of ``source`` at the reader's size, for a stage of a run.

    ``key`` is what features depend on beside the tower, the data and how the tower is read.
    """
    encoder, read = reader.encoder, reader.read
    store = FeatureStore(
        source,
        produce,
        replace(encoder.preprocess, size=(reader.size, reader.size), resize_mode="squash"),
        run.path / "features",
        store_key(
            tower=tensors_digest(encoder.image.state_dict()),
            architecture=encoder.data.origin.architecture,
            data=source.fingerprint,
            read=read.model_dump_json(include={"size", "layers", "vv_start", "ln_post_global", "resampling"}),
            dtype=cache.dtype,
            **key,
        ),
        keep=cache.keep,
        dtype=DTYPES[cache.dtype],
        batch_size=cache.batch_size,
        device=run.device,
    )
    store.fill(run.log)
    if store.bad:
        run.log.info(f"{stage}: {len(store.bad)} pictures can't be read: {'; '.join(store.bad[:3])}")
    return store


def store_key(**parts: object) -> str:
    """One hash of everything that features depend on."""
    told = "|".join(f"{name}={parts[name]!r}" for name in sorted(parts))
    return hashlib.sha256(told.encode()).hexdigest()
