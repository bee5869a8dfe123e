"""Asking a text model once about every caption: resumable, shard by shard, captions that were too long counted."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clipgraft import distributed, files
from clipgraft.data.base import BadSample, Entry, Source, entry_of
from clipgraft.data.loader import class_prompts
from clipgraft.errors import InputError
from clipgraft.log import RunLog
from clipgraft_llm.cache.layout import DESCRIPTION, STORED, Description, hash_of, read_description, shard_file
from clipgraft_llm.tower.language_model import LanguageModel
from clipgraft_llm.tower.model_folder import ModelFolder
from clipgraft_llm.tower.settings import TextSettings


@dataclass(frozen=True, slots=True)
class Built:
    """What a cache holds: ``cut`` captions lost words, ``skipped`` samples could not be read or have no caption."""

    folder: str
    samples: int
    captions: int
    cut: int
    first_cut: tuple[str, ...]
    skipped: int
    first_skipped: tuple[str, ...]
    shards: int
    reused: int
    bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def captions_of(source: Source, entry: Entry) -> tuple[str, ...]:
    """The captions that training draws from: a sample's own, or its class in the source's templates."""
    if not entry.captions and entry.label is not None and source.classes:
        return class_prompts(source.classes[entry.label], source.templates)
    return entry.captions


def build_cache(
    source: Source,
    out: Path,
    *,
    folder: ModelFolder,
    settings: TextSettings,
    read: Callable[[], LanguageModel],
    log: RunLog,
    stored: str = "bf16",
    rows: int = 4096,
    batch_size: int = 64,
    device: torch.device | None = None,
) -> Built:
    """Features of every caption of ``source`` in ``out``. Shards that an earlier call with equal settings left stay.

    ``read`` gives the model, when it is needed. Ranks share the shards. Raises ``InputError`` when ``out`` holds
    something else.
    """
    listed, skipped = _listed(source, log=log)
    if not listed:
        raise InputError(f"{source.name} has no sample with a caption; give a csv: with a caption column")
    most = max(len(captions) for _, captions in listed)
    described = Description.of(
        folder, settings, stored=stored, captions=most, rows=rows, source=source.name,
        source_fingerprint=source.fingerprint, samples=len(listed),
    )  # fmt: skip
    shards = [listed[k : k + rows] for k in range(0, len(listed), rows)]
    if distributed.rank() == 0:
        _prepare(out, described)
    distributed.barrier()
    mine = [
        k
        for k in range(distributed.rank(), len(shards), distributed.world_size())
        if not _is_there(shard_file(out, k), described, len(shards[k]))
    ]
    language = read().to(device or torch.device("cpu")) if mine else None
    with log.progress("text features", sum(len(shards[k]) for k in mine)) as bar:
        for k in mine:
            assert language is not None
            _write_shard(shard_file(out, k), shards[k], language, described, batch_size=batch_size, bar=bar)
    written = sum(distributed.to_all(len(mine)))
    paths = [shard_file(out, k) for k in range(len(shards))]
    cut = [name for path in paths for name in _cut_in(path)]
    built = Built(
        str(out), len(listed), sum(len(c) for _, c in listed), len(cut), tuple(cut[:10]), len(skipped),
        tuple(skipped[:10]), len(shards), len(shards) - written, sum(path.stat().st_size for path in paths),
    )  # fmt: skip
    if distributed.rank() == 0:
        files.write_json(out / DESCRIPTION, {**described.as_dict(), "complete": True, "built": built.as_dict()})
    distributed.barrier()
    return built


def _listed(source: Source, *, log: RunLog) -> tuple[list[tuple[str, tuple[str, ...]]], list[str]]:
    """(id, captions) of every sample that has some, and the ids of the others."""
    found, skipped = list[tuple[str, tuple[str, ...]]](), list[str]()
    with log.progress("captions", len(source)) as bar:
        for index in range(len(source)):
            try:
                entry = entry_of(source, index)
                captions = captions_of(source, entry)
            except BadSample as error:
                captions, name = (), error.sample_id
            else:
                name = entry.id
            if captions and all(captions):
                found.append((name, captions))
            else:
                skipped.append(name)
            bar.advance()
    return found, skipped


def _prepare(out: Path, described: Description) -> None:
    """Make ``out``, or check that it is the same cache, not finished."""
    if (out / DESCRIPTION).is_file():
        before, _ = read_description(out)
        for name in ("features", "stored", "rows", "captions", "source_fingerprint"):
            old, new = getattr(before, name), getattr(described, name)
            if old != new:
                what = (
                    "another model, prompt or setting" if name == "features" else f"{name} {old!r} instead of {new!r}"
                )
                raise InputError(f"{out} is a cache made with {what}; choose another --out, or remove that folder")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not empty and no cache; choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"can't create {out}: {error.strerror}; choose a writable --out") from None
    files.write_json(out / DESCRIPTION, {**described.as_dict(), "complete": False})


def _is_there(file: Path, described: Description, count: int) -> bool:
    """Whether a shard is whole and of this cache."""
    try:
        with safe_open(file, framework="pt") as shard:
            metadata = shard.metadata() or {}
            shape = shard.get_slice("emb").get_shape()
    except (OSError, SafetensorError):
        return False
    return metadata.get("features") == described.features and shape == [count, described.captions, described.width]


@torch.inference_mode()
def _write_shard(
    file: Path,
    listed: Sequence[tuple[str, tuple[str, ...]]],
    language: LanguageModel,
    described: Description,
    *,
    batch_size: int,
    bar: Any,
) -> None:
    """One file, in one rename."""
    texts = sorted({c for _, captions in listed for c in captions}, key=lambda c: (len(c), c))
    place = {text: k for k, text in enumerate(texts)}
    found, lost = [], set[str]()
    for start in range(0, len(texts), batch_size):
        part = texts[start : start + batch_size]
        ids, cut = language.tokens.rows(part)
        lost |= {text for text, is_cut in zip(part, cut, strict=True) if is_cut}
        found.append(language(language.tokens.trim(ids).to(language.device)).pooled.cpu())
        bar.advance(0, note=f"{min(start + batch_size, len(texts))} of {len(texts)} captions of a shard")
    rows = torch.cat(found).to(STORED[described.stored])
    emb = torch.zeros(len(listed), described.captions, described.width, dtype=rows.dtype)
    hashed = torch.zeros(len(listed), described.captions, dtype=torch.int64)
    for row, (_, captions) in enumerate(listed):
        emb[row, : len(captions)] = rows[[place[c] for c in captions]]
        hashed[row, : len(captions)] = torch.tensor([hash_of(c) for c in captions])
    keys = torch.tensor([hash_of(name) for name, _ in listed], dtype=torch.int64)
    tensors: dict[str, Tensor] = {"emb": emb, "key_hash": keys, "caption_hash": hashed}
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        names = [name for name, captions in listed for caption in captions if caption in lost]
        files.write_tensors(temporary, tensors, described.metadata() | {"cut": json.dumps(names)})
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    bar.advance(len(listed), note="")


def _cut_in(file: Path) -> list[str]:
    """Ids of samples, once per caption of theirs that lost words."""
    with safe_open(file, framework="pt") as shard:
        return [str(name) for name in json.loads((shard.metadata() or {}).get("cut", "[]"))]
