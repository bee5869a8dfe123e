"""Text features from disk, joined by key: shards are mapped, an index of keys and captions is sorted once.

B captions, V features, n samples, C captions per sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Generator, Tensor

from clipgraft.data.base import BadSample, Drawn, Entry, Sample, Source, entry_of, varied_of
from clipgraft.errors import InputError
from clipgraft.log import RunLog
from clipgraft_llm.cache.build import captions_of
from clipgraft_llm.cache.layout import hash_of, hashes, read_description, shard_file, why_other
from clipgraft_llm.tower.model_folder import ModelFolder
from clipgraft_llm.tower.settings import TextSettings


class FeatureCache:
    """A finished cache. Features stay on disk until they are asked for; worker processes share the mapping."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.described, more = read_description(folder)
        if not more.get("complete"):
            raise InputError(f"{folder} is not finished; run the same clipgraft llm cache command again to complete it")
        count = -(-self.described.samples // self.described.rows)
        shards = [self._shard(k) for k in range(count)]
        self._emb = [emb for emb, _, _ in shards]
        keys, captions = torch.cat([k for _, k, _ in shards]), torch.cat([c for _, _, c in shards])
        self._keys, self._key_rows = keys.sort(stable=True)
        self._captions = captions
        self._texts, self._text_rows = captions.flatten().sort(stable=True)

    def _shard(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        file = shard_file(self.folder, number)
        try:
            with safe_open(file, framework="pt") as shard:
                if (shard.metadata() or {}).get("features") != self.described.features:
                    raise InputError(f"{file} belongs to another cache; build this one again into an empty folder")
                return shard.get_tensor("emb"), shard.get_tensor("key_hash"), shard.get_tensor("caption_hash")
        except FileNotFoundError:
            raise InputError(f"{file} is missing; run the same clipgraft llm cache command again") from None
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:100]
            raise InputError(
                f"{file} is damaged ({reason}); remove it and run the same clipgraft llm cache again"
            ) from None

    def __len__(self) -> int:
        return len(self._keys)

    def require(self, *, folder: ModelFolder, settings: TextSettings) -> None:
        """``InputError`` unless these are the features of that model, asked that way."""
        if why := why_other(self.described, folder=folder, settings=settings):
            raise InputError(
                f"the cache {self.folder} doesn't fit: {why}; build one for this run with clipgraft llm cache, or "
                "change text.* back"
            )

    def has(self, key: str, captions: Sequence[str]) -> bool:
        """Whether features of a sample are there, for exactly these captions."""
        wanted, at = hash_of(key), int(torch.searchsorted(self._keys, hash_of(key)))
        if at == len(self._keys) or int(self._keys[at]) != wanted:
            return False
        found = self._captions[self._key_rows[at]]
        return found[found != 0].tolist() == hashes(captions).tolist()

    def rows(self, captions: Sequence[str]) -> Tensor:
        """(B,) places of captions in the cache; ``InputError`` for one that isn't there."""
        wanted = hashes(captions)
        at = torch.searchsorted(self._texts, wanted).clamp(max=len(self._texts) - 1)
        if (absent := self._texts[at] != wanted).any():
            text = captions[int(absent.int().argmax())]
            raise InputError(f"the cache {self.folder} has no features of the caption {text[:60]!r}; build it again")
        return self._text_rows[at]

    def features(self, captions: Sequence[str]) -> Tensor:
        """(B, V) fp32 of captions by their text."""
        rows, many = self.rows(captions), self.described.captions
        out = torch.empty(len(rows), self.described.width)
        for k, place in enumerate(rows.tolist()):
            sample, caption = divmod(place, many)
            shard, row = divmod(sample, self.described.rows)
            out[k] = self._emb[shard][row, caption]
        return out


class FeatureLookup:
    """What stands in for a tokenizer where text features are cached: captions -> (B, V) fp32 instead of ids.

    The training loader draws a caption per sample and gives it here, in its worker processes.
    """

    pad_id = 0

    def __init__(self, cache: FeatureCache) -> None:
        self.cache, self.context_length = cache, cache.described.width

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(B, V)."""
        return self.cache.features(texts)

    def save(self, folder: str) -> None:
        """Nothing: this never travels with a model."""


class Covered:
    """The samples of a source that a cache has; ``missing`` others were left out, the first ten are named."""

    def __init__(self, source: Source, cache: FeatureCache, *, log: RunLog) -> None:
        self.inner: Any = source
        self.name, self.classes, self.templates = source.name, source.classes, source.templates
        self.attributes: Mapping[str, Sequence[str]] = source.attributes
        kept, self.first_missing, self.missing = list[int](), list[str](), 0
        with log.progress("joining captions with their features", len(source)) as bar:
            for index in range(len(source)):
                try:
                    entry = entry_of(source, index)
                except BadSample:
                    kept.append(index)  # the loader counts it
                    continue
                if cache.has(entry.id, captions_of(source, entry)):
                    kept.append(index)
                else:
                    self.missing += 1
                    self.first_missing += [entry.id] if len(self.first_missing) < 10 else []
                bar.advance()
        self._kept = torch.tensor(kept, dtype=torch.int64)
        self.fingerprint = f"{source.fingerprint}-{cache.described.features[:16]}-{self.missing}"
        if self.missing:
            log.info(
                f"{self.missing} of {len(source)} samples of {source.name} have no cached features and are left out, "
                f"such as {', '.join(self.first_missing[:3])}"
            )
        if not kept:
            raise InputError(
                f"no sample of {source.name} is in the cache {cache.folder}, which was made of "
                f"{cache.described.source}; build it of this data"
            )

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Sample:
        found: Sample = self.inner[int(self._kept[index])]
        return found

    def varied(self, index: int, rng: Generator) -> Sample:
        """As the source draws it; its captions must be the same whatever ``rng`` says."""
        return varied_of(self.inner, int(self._kept[index]), rng)

    def entry(self, index: int) -> Entry:
        """Everything but the image."""
        return entry_of(self.inner, int(self._kept[index]))

    def content(self, index: int) -> bytes:
        """The image file, where the source has files."""
        place = int(self._kept[index])
        found: Any = getattr(self.inner, "content", None)
        if found is None:
            raise LookupError(f"{self.name} makes its pictures")
        content: bytes = found(place)
        return content


class CoveredMix(Covered):
    """The same of a mix, whose epoch draws a planned amount per part."""

    @property
    def quotas(self) -> list[tuple[list[int], int]]:
        """(indices here, draws) of every part that has a sample left."""
        place = {index: k for k, index in enumerate(self._kept.tolist())}
        parts = [([place[i] for i in indices if i in place], count) for indices, count in self.inner.quotas]
        return [(indices, count) for indices, count in parts if indices]


def covered(source: Source, cache: FeatureCache, *, log: RunLog) -> Covered:
    """The samples of ``source`` that ``cache`` has."""
    return (CoveredMix if isinstance(source, Drawn) else Covered)(source, cache, log=log)
