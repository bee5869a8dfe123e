"""Training on a reinforced data set: the stored crop is replayed, and what the teachers said about it comes along.

A augmentations, R captions and C written ones per sample, S the teachers' dimensions together, L text length.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Generator, Tensor

from clipgraft.data.base import BadSample, Drawn, Entry, Sample, Source, entry_of
from clipgraft.errors import InputError
from clipgraft.log import RunLog
from clipgraft_llm.cache.build import captions_of
from clipgraft_llm.cache.layout import hash_of, hashes
from clipgraft_llm.reinforce.augment import Augmentation, replay, size_of
from clipgraft_llm.reinforce.layout import read_description, shard_file


class ReinforcedStore:
    """A finished store; tensors stay on disk until they are asked for."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.described, complete = read_description(self.folder)
        if not complete:
            raise InputError(f"{folder} is not finished; run the same clipgraft llm reinforce-data command again")
        count = -(-self.described.samples // self.described.rows)
        self.shards = [self._shard(k) for k in range(count)]
        self.place = {
            key: (k, row)
            for k, shard in enumerate(self.shards)
            for row, (key, size) in enumerate(zip(shard["key_hash"].tolist(), shard["size"].tolist(), strict=True))
            if size[0]
        }

    def _shard(self, number: int) -> dict[str, Tensor]:
        file = shard_file(self.folder, number)
        try:
            with safe_open(file, framework="pt") as shard:
                if json.loads((shard.metadata() or {}).get("store", "null")) != self.described.as_dict():
                    raise InputError(f"{file} belongs to another store; write this one again into an empty folder")
                return {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118, no mapping
        except FileNotFoundError:
            raise InputError(f"{file} is missing; run the same clipgraft llm reinforce-data command again") from None
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:100]
            raise InputError(f"{file} is damaged ({reason}); remove it and run the same command again") from None

    def written(self, shard: int) -> list[list[str]]:
        """The written captions of a shard's samples."""
        found: list[list[str]] = json.loads(self.shards[shard]["written_json"].numpy().tobytes().decode())
        return found


class Reinforced:
    """The samples of ``source`` that ``store`` has; the others are told and left out.

    Every draw takes one augmentation, one caption and one written caption, anew in every epoch: ``image`` (3, H, W')
    uint8 of the student's ``size``, extra ``teacher_image``, ``teacher_text`` (S,) and, where the store has written
    captions, ``synthetic`` (L,) and ``teacher_synthetic`` (S,). A sample without a written caption takes its own twice.
    """

    def __init__(
        self,
        source: Source,
        store: ReinforcedStore,
        *,
        tokenizer: Callable[[Sequence[str]], Tensor],
        size: tuple[int, int],
        log: RunLog | None = None,
    ) -> None:
        self.source, self.store, self.tokenizer, self.size = source, store, tokenizer, size
        self.name, self.classes, self.templates = source.name, source.classes, source.templates
        self.attributes: Mapping[str, Sequence[str]] = source.attributes
        log, self.kept, missing = log or RunLog(), list[int](), list[str]()
        with log.progress("joining samples with their teachers", len(source)) as bar:
            for index in range(len(source)):
                bar.advance()
                try:
                    entry = entry_of(source, index)
                except BadSample as error:
                    missing.append(error.sample_id)
                    continue
                place = store.place.get(hash_of(entry.id))
                stored = None if place is None else store.shards[place[0]]["caption_hash"][place[1]]
                told = hashes(captions_of(source, entry)).tolist()
                many = store.described.captions
                if stored is not None and told and stored[: len(told)].tolist() == told and len(told) <= many:
                    self.kept.append(index)
                else:
                    missing.append(entry.id)
        if not self.kept:
            raise InputError(
                f"no sample of {source.name} is in the store {store.folder}, which was made of "
                f"{store.described.source}; write one of this data with clipgraft llm reinforce-data"
            )
        if missing:
            log.info(
                f"{len(missing)} of {len(source)} samples of {source.name} have no stored teacher and are left out, "
                f"such as {', '.join(missing[:3])}"
            )
        self._written = [store.written(k) for k in range(len(store.shards))]
        self.fingerprint = f"{source.fingerprint}-reinforced-{store.described.teachers}-{len(self.kept)}"

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> Sample:
        return self.source[self.kept[index]]

    def entry(self, index: int) -> Entry:
        """Everything but the image."""
        return entry_of(self.source, self.kept[index])

    def content(self, index: int) -> bytes:
        """The picture's file, which training never shows as it is."""
        raise LookupError(f"{self.name}: training pictures are crops of the files")

    def varied(self, index: int, rng: Generator) -> Sample:
        """One crop with one caption and one written caption, and what the teachers said about each."""
        sample = self.source[self.kept[index]]
        place, row = self.store.place[hash_of(sample.id)]
        shard, r = self.store.shards[place], self.store.described.captions
        if size_of(sample.image) != tuple(shard["size"][row].tolist()):
            raise BadSample(sample.id, "the picture has another size than when the teachers saw it")
        a = int(torch.randint(self.store.described.augmentations, (), generator=rng))
        many = self.store.described.operations
        operations = zip(shard["op"][row, a, :many].tolist(), shard["strength"][row, a, :many].tolist(), strict=True)
        top, left, height, width = shard["box"][row, a].tolist()
        drawn = Augmentation((top, left, height, width), tuple(operations))
        captions = sample.captions or captions_of(self.source, entry_of(self.source, self.kept[index]))
        own = int(torch.randint(len(captions), (), generator=rng))
        extra = {
            "teacher_image": shard["image_emb"][row, a].float(),
            "teacher_text": shard["text_emb"][row, own].float(),
        }
        if self.store.described.written:
            texts = self._written[place][row]
            other = int(torch.randint(max(1, len(texts)), (), generator=rng))
            extra["synthetic"] = self.tokenizer([texts[other] if texts else captions[own]])[0]
            extra["teacher_synthetic"] = shard["text_emb"][row, r + other if texts else own].float()
        image = replay(sample.image, drawn, self.size)
        extra = {**sample.extra, **extra}
        return replace(sample, image=image, captions=(captions[own],), caption_weights=(), extra=extra)


def reinforced(
    source: Source,
    store: ReinforcedStore,
    *,
    tokenizer: Callable[[Sequence[str]], Tensor],
    size: tuple[int, int],
    log: RunLog | None = None,
) -> Reinforced:
    """``source`` with the teachers of ``store``; a mix would lose its plan and is refused."""
    if isinstance(source, Drawn):
        raise InputError(
            f"{source.name}: a mix plans its epochs, which a reinforced store does not follow; use its parts"
        )
    return Reinforced(source, store, tokenizer=tokenizer, size=size, log=log)
