"""Asking teachers once: every picture under every augmentation, every caption, shard by shard; resumable."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from clipgraft import distributed, files
from clipgraft.data.base import BadSample, Sample, Source, entry_of
from clipgraft.data.sampling import seeded
from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft.log import RunLog
from clipgraft_llm.cache.build import captions_of
from clipgraft_llm.cache.layout import STORED, hash_of, hashes
from clipgraft_llm.reinforce.augment import Augmentation, ReplayableTransform, replay, size_of
from clipgraft_llm.reinforce.layout import DESCRIPTION, Reinforcement, StoredTeacher, read_description, shard_file
from clipgraft_llm.reinforce.written import WrittenCaptions


@dataclass(frozen=True, slots=True)
class Teacher:
    """A model, how it was named, and the scale of its cosines."""

    model: str
    encoder: Encoder
    scale: float

    @classmethod
    def of(cls, model: str, encoder: Encoder, *, scale: float | None = None) -> Teacher:
        """Frozen; without ``scale`` the model's own, at most 100."""
        own = min(100.0, float(encoder.logit_scale.detach().exp()))
        return cls(model, encoder.requires_grad_(False).eval(), own if scale is None else scale)

    def stored(self) -> StoredTeacher:
        """What the store says about it."""
        digest = files.tensors_digest(self.encoder.state_dict())
        return StoredTeacher(model=self.model, sha256=digest, dim=self.encoder.image.embed_dim, scale=self.scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenStore:
    """Counts: ``skipped`` samples could not be read or have no caption; ``without`` have no written caption."""

    folder: str
    samples: int
    skipped: int
    first_skipped: tuple[str, ...]
    without: int
    shards: int
    reused: int
    bytes: int


def write_store(
    source: Source,
    out: Path,
    *,
    teachers: Sequence[Teacher],
    written: WrittenCaptions | None,
    transform: ReplayableTransform,
    augmentations: int,
    most_written: int = 5,
    seed: int = 0,
    stored: str = "bf16",
    rows: int = 1024,
    batch_size: int = 64,
    log: RunLog,
) -> WrittenStore:
    """A reinforced data set of ``source`` in ``out``; whole shards of an earlier call with equal settings stay."""
    bare = [t.model for t in teachers if t.encoder.text is None]
    if bare or not teachers:
        raise InputError(f"{bare[0]} has no text tower; a teacher needs one" if bare else "name a teacher")
    listed, skipped = _listed(source, written, most_written=most_written, log=log)
    if not listed:
        raise InputError(f"{source.name} has no sample with a caption; give a csv: with a caption column")
    described = Reinforcement(
        teachers=tuple(t.stored() for t in teachers),
        source=source.name,
        source_fingerprint=source.fingerprint,
        samples=len(listed),
        captions=max(len(row.captions) for row in listed),
        written=max(len(row.written) for row in listed),
        written_sha256="" if written is None else written.sha256,
        augmentations=augmentations,
        area=transform.area,
        operations=transform.operations,
        magnitude=transform.magnitude,
        seed=seed,
        stored=stored,
        rows=rows,
    )
    shards = [listed[k : k + rows] for k in range(0, len(listed), rows)]
    if distributed.rank() == 0:
        _prepare(out, described)
    distributed.barrier()
    own = range(distributed.rank(), len(shards), distributed.world_size())
    mine = [k for k in own if not _is_there(shard_file(out, k), described, len(shards[k]))]
    with log.progress("asking teachers", sum(len(shards[k]) for k in mine)) as bar:
        for k in mine:
            _write_shard(shard_file(out, k), source, shards[k], teachers, described, transform, batch_size, bar)
    fresh = sum(distributed.to_all(len(mine)))
    if distributed.rank() == 0:
        files.write_json(out / DESCRIPTION, {**described.as_dict(), "complete": True})
    distributed.barrier()
    return WrittenStore(
        folder=str(out),
        samples=len(listed),
        skipped=len(skipped),
        first_skipped=tuple(skipped[:10]),
        without=sum(not row.written for row in listed),
        shards=len(shards),
        reused=len(shards) - fresh,
        bytes=sum(shard_file(out, k).stat().st_size for k in range(len(shards))),
    )


@dataclass(frozen=True, slots=True)
class _Row:
    index: int
    id: str
    captions: tuple[str, ...]
    written: tuple[str, ...]


def _listed(
    source: Source, written: WrittenCaptions | None, *, most_written: int, log: RunLog
) -> tuple[list[_Row], list[str]]:
    found, skipped = list[_Row](), list[str]()
    with log.progress("captions", len(source)) as bar:
        for index in range(len(source)):
            bar.advance()
            try:
                entry = entry_of(source, index)
            except BadSample as error:
                skipped.append(error.sample_id)
                continue
            captions = captions_of(source, entry)
            if captions:
                more = () if written is None else written.of(entry.id)[:most_written]
                found.append(_Row(index, entry.id, captions, more))
            else:
                skipped.append(entry.id)
    return found, skipped


def _prepare(out: Path, described: Reinforcement) -> None:
    if (out / DESCRIPTION).is_file():
        before, _ = read_description(out)
        if before != described:
            names = [n for n in described.__dataclass_fields__ if getattr(before, n) != getattr(described, n)]
            raise InputError(
                f"{out} is a store made with another {names[0]}; choose another --out, or remove that folder"
            )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not empty and no store; choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"can't create {out}: {error.strerror}; choose a writable --out") from None
    files.write_json(out / DESCRIPTION, {**described.as_dict(), "complete": False})


def _is_there(file: Path, described: Reinforcement, count: int) -> bool:
    try:
        with safe_open(file, framework="pt") as shard:
            shape = shard.get_slice("image_emb").get_shape()
            told = json.loads((shard.metadata() or {}).get("store", "null"))
    except (OSError, SafetensorError, ValueError):
        return False
    return told == described.as_dict() and shape == [count, described.augmentations, sum(described.dims)]


@torch.inference_mode()
def _write_shard(
    file: Path,
    source: Source,
    rows: Sequence[_Row],
    teachers: Sequence[Teacher],
    described: Reinforcement,
    transform: ReplayableTransform,
    batch_size: int,
    bar: Any,
) -> None:
    """One file, in one rename. A picture that can't be read has zeros for ``size``: readers leave it out."""
    n, many, wide = len(rows), described.augmentations, sum(described.dims)
    dtype, texts = STORED[described.stored], described.captions + described.written
    tensors: dict[str, Tensor] = {
        "image_emb": torch.zeros(n, many, wide, dtype=dtype),
        "text_emb": torch.zeros(n, texts, wide, dtype=dtype),
        "caption_hash": torch.zeros(n, texts, dtype=torch.int64),
        "key_hash": hashes([row.id for row in rows]),
        "size": torch.zeros(n, 2, dtype=torch.int32),
        "box": torch.zeros(n, many, 4, dtype=torch.int32),
        "op": torch.zeros(n, many, max(1, described.operations), dtype=torch.uint8),
        "strength": torch.zeros(n, many, max(1, described.operations)),
    }
    waiting: list[tuple[int, int, Sample, Augmentation]] = []

    def ask() -> None:
        offset = 0
        for teacher in teachers:
            preprocess, device = teacher.encoder.preprocess, teacher.encoder.logit_scale.device
            pixels = torch.stack([replay(s.image, a, preprocess.size) for _, _, s, a in waiting])
            pixels = preprocess.normalize(pixels.to(device).float().div(255))
            found = F.normalize(teacher.encoder.image(pixels).pooled.float(), dim=-1).cpu()
            for (row, place, _, _), value in zip(waiting, found, strict=True):
                tensors["image_emb"][row, place, offset : offset + len(value)] = value.to(dtype)
            offset += teacher.encoder.image.embed_dim
        waiting.clear()

    for k, row in enumerate(rows):
        bar.advance()
        try:
            sample = source[row.index]
        except BadSample:
            continue
        height, width = size_of(sample.image)
        tensors["size"][k] = torch.tensor([height, width])
        generator = seeded(described.seed, 0, row.id)
        for place in range(many):
            drawn = transform.sample(height, width, generator)
            tensors["box"][k, place] = torch.tensor(drawn.box)
            for p, (op, strength) in enumerate(drawn.operations):
                tensors["op"][k, place, p], tensors["strength"][k, place, p] = op, strength
            waiting.append((k, place, replace(sample, captions=()), drawn))
            if len(waiting) == batch_size:
                ask()
    if waiting:
        ask()
    _texts(tensors, rows, teachers, described, batch_size=batch_size, dtype=dtype)
    told = json.dumps([list(row.written) for row in rows], ensure_ascii=False).encode()
    tensors["written_json"] = torch.frombuffer(bytearray(told), dtype=torch.uint8)
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        files.write_tensors(temporary, tensors, {"store": json.dumps(described.as_dict())})
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _texts(
    tensors: dict[str, Tensor],
    rows: Sequence[_Row],
    teachers: Sequence[Teacher],
    described: Reinforcement,
    *,
    batch_size: int,
    dtype: torch.dtype,
) -> None:
    """Captions and written ones of a shard, each text asked once."""
    places = [(k, i, text) for k, row in enumerate(rows) for i, text in enumerate(row.captions)]
    places += [(k, described.captions + i, text) for k, row in enumerate(rows) for i, text in enumerate(row.written)]
    unique = sorted({text for _, _, text in places}, key=lambda text: (len(text), text))
    number = {text: k for k, text in enumerate(unique)}
    parts = []
    for teacher in teachers:
        text, device = teacher.encoder.text, teacher.encoder.logit_scale.device
        assert text is not None  # write_store saw it
        found = []
        for start in range(0, len(unique), batch_size):
            ids = text.trim(teacher.encoder.tokenizer(unique[start : start + batch_size]).to(device))
            found.append(F.normalize(text(ids).pooled.float(), dim=-1).cpu())
        parts.append(torch.cat(found))
    embedded = torch.cat(parts, 1).to(dtype)
    for k, place, told in places:
        tensors["text_emb"][k, place] = embedded[number[told]]
        tensors["caption_hash"][k, place] = hash_of(told)
