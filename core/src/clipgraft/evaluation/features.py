"""One pass over the data and one over the texts, shared by all evaluators of a call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clipgraft.data.base import Pair, PairSource, Sample, Source
from clipgraft.data.loader import BadSamples, class_prompts, evaluation_batches
from clipgraft.data.reading import readable, stack_images, without_images
from clipgraft.distributed import any_rank, rank, to_all, world_size
from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft.evaluation.feature_cache import Entry, FeatureCache, from_records, key_of, to_records, tower_digest
from clipgraft.evaluation.progress import LateBar
from clipgraft.evaluation.sharding import all_rows, together
from clipgraft.log import RunLog
from clipgraft.types import FeatureRequest

BF16, PROMPTS = torch.bfloat16, 2**16
"""What bf16 is to torch; prompts of a classifier that are encoded at a time."""


@dataclass(frozen=True, slots=True)
class Pass:
    """What a pass over a source left: unit embeddings (m, D), maybe tokens (m, N, W), items without their images."""

    pooled: Tensor | None
    tokens: Tensor | None
    items: list[Sample | Pair]
    bad: BadSamples


class EncoderFeatures:
    """Embeddings of one encoder whose weights stay as they are meanwhile: fp32, on the CPU, computed when asked for.

    Rows are the readable items in source order. With a process group every rank encodes its share and has all rows, to
    the last bit those of one process, so that all ranks must ask for the same. ``tokens`` are fingerprints of sources
    whose tokens will be asked for, so that one pass brings both. ``classifiers`` may outlive this object: a key covers
    all that its value depends on. ``workers``: as ``evaluation_batches`` takes it. ``cache``: features on disk.
    ``precision`` bf16 is autocast of the towers.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        batch_size: int = 256,
        tokens: frozenset[str] = frozenset(),
        classifiers: MutableMapping[str, Tensor] | None = None,
        log: RunLog | None = None,
        workers: int | None = 0,
        cache: FeatureCache | None = None,
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        self.encoder, self.batch_size, self._tokens, self.log = encoder, batch_size, tokens, log
        self.workers, self._cache, self._outlives = workers, cache, classifiers is not None
        self.precision = precision
        self._classifiers: MutableMapping[str, Tensor] = {} if classifiers is None else classifiers
        self._passes: dict[str, Pass] = {}
        self._digests: dict[str, str] = {}

    def samples(self, source: Source) -> list[Sample]:
        """What is known about each row of ``images(source)``; its image and ``extra`` are gone."""
        return [item for item in self._read(source).items if isinstance(item, Sample)]

    def pairs(self, source: PairSource) -> list[Pair]:
        """What is known about each row of ``pair_images(source)``."""
        return [item for item in self._read(source, paired=True).items if isinstance(item, Pair)]

    def skipped(self, source: Source | PairSource) -> int:
        """How many could not be read, if ``source`` was read."""
        done = self._passes.get(source.fingerprint)
        return done.bad.count if done else 0

    def images(self, source: Source) -> Tensor:
        """(n, D) of length one."""
        return _rows(self._read(source))

    def tokens(self, source: Source) -> Tensor:
        """(n, N, W) patch tokens."""
        tokens = self._read(source, tokens=True).tokens
        if tokens is None:
            raise InputError(f"{self.encoder.data.origin.uri} has no patch tokens; measure its pooled embedding")
        return tokens

    def pair_images(self, source: PairSource) -> tuple[Tensor, Tensor]:
        """Two (n, D) of length one: first and second image of every pair."""
        rows = _rows(self._read(source, paired=True))
        return rows[0::2], rows[1::2]

    def labels(self, source: Source) -> Tensor:
        """(n,) class indices; ``InputError`` unless every row has one of the source's two classes or more."""
        if len(source.classes) < 2:
            raise InputError(
                f"{source.name} has {len(source.classes)} classes where two or more are needed; use class folders or a "
                "label column"
            )
        for sample in self.samples(source):
            if sample.label is None or not 0 <= sample.label < len(source.classes):
                had = f"label {sample.label}, outside its {len(source.classes)} classes" if sample.label else "no label"
                raise InputError(f"{source.name}: {sample.id} has {had}; correct the labels of the data")
        return torch.tensor([sample.label for sample in self.samples(source)])

    def texts(self, texts: Sequence[str]) -> Tensor:
        """(n, D) of length one; equal texts are encoded once and have equal rows."""
        unique = list(dict.fromkeys(texts))
        row, ids = {text: k for k, text in enumerate(unique)}, self.encoder.tokenizer(unique)
        key = self._text_key(ids) if self._cache else ""
        with LateBar(self.log, "encoding texts", len(ids)) as bar:
            found = self._stored(key, lambda: self._encode(ids, bar))
        return found[[row[text] for text in texts]]

    def classifier(self, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
        """(K, D) of length one: the mean over templates of unit text embeddings, normalised again.

        Equal names have equal rows.
        """
        names = list(dict.fromkeys(classes))
        prompts = [prompt for name in names for prompt in class_prompts(name, templates)]
        ids = torch.cat([self.encoder.tokenizer(part).int() for part in _blocks(prompts, PROMPTS)])
        each = len(prompts) // len(names)
        key = self._text_key(ids, each)
        if key not in self._classifiers:
            self._classifiers[key] = self._stored(key if self._cache else "", lambda: self._means(ids, each))
        row = {name: k for k, name in enumerate(names)}
        return self._classifiers[key][[row[name] for name in classes]]

    def _means(self, ids: Tensor, each: int) -> Tensor:
        """(K * each, L) ids -> (K, D); as many classes at a time as ``PROMPTS`` allows."""
        found = []
        with LateBar(self.log, "encoding prompts", len(ids)) as bar:
            for block in torch.split(ids, max(1, PROMPTS // each) * each):
                mean = self._encode(block.long(), bar).view(len(block) // each, each, -1).mean(1)
                found.append(F.normalize(mean, dim=-1))
        return torch.cat(found)

    def _read(self, source: Source | PairSource, *, paired: bool = False, tokens: bool = False) -> Pass:
        if hasattr(source, "patterns") != paired:
            kinds = ("single images", "minimal pairs (such as toyworld/pairs)")
            raise InputError(f"{source.name} holds {kinds[not paired]}; this needs {kinds[paired]}")
        done = self._passes.get(source.fingerprint)
        if done is not None and (done.tokens is not None or not tokens):
            return done
        tokens = tokens or source.fingerprint in self._tokens
        key = self._image_key(source, tokens) if self._cache else ""
        done = self._from_disk(key, source)
        if done is None:
            done = _merged(together(lambda: self._share(source, tokens)))
            if done.pooled is not None:
                tensors = {"pooled": done.pooled} | ({} if done.tokens is None else {"tokens": done.tokens})
                bad = [sorted(done.bad.indices), done.bad.first]
                self._to_disk(key, Entry(tensors, {"bad": bad, "items": to_records(done.items)} if key else None))
        if not done.items:
            raise InputError(f"{source.name} has nothing that can be read: {done.bad}")
        if done.bad.count:
            self._say(f"{source.name}: {done.bad}; skipped")
        self._passes[source.fingerprint] = done
        return done

    def _share(self, source: Source | PairSource, tokens: bool) -> Pass:
        """This rank's part of a pass."""
        want, preprocess, parameter = FeatureRequest(tokens=tokens), self.encoder.preprocess, self._parameter()
        pooled, patches, items, bad = list[Tensor](), list[Tensor](), list[Sample | Pair](), BadSamples(len(source))
        batches = evaluation_batches(
            source,
            preprocess=preprocess,
            batch_size=self.batch_size,
            bad=bad,
            workers=self.workers,
            rank=rank(),
            world=world_size(),
        )
        with LateBar(self.log, f"encoding {source.name}", len(source) // world_size()) as bar:
            for batch in batches:
                with self._frozen():
                    found = self.encoder.image(preprocess.normalize(stack_images(batch).to(parameter)), want)
                pooled.append(F.normalize(found.pooled.float(), dim=-1).cpu())
                patches += [found.tokens.float().cpu()] if tokens and found.tokens is not None else []
                items += map(without_images, batch)
                bar.advance(len(batch))
        return Pass(torch.cat(pooled) if pooled else None, torch.cat(patches) if patches else None, items, bad)

    def _encode(self, ids: Tensor, bar: LateBar) -> Tensor:
        """(n, L) ids -> (n, D) of length one, in chunks of equal length where texts can be trimmed to it."""
        text = self.encoder.text
        assert text is not None  # the tokenizer has refused otherwise
        chunks = _chunks(ids, self.batch_size, by_length=text.trim_exact)
        world = world_size()

        def share() -> Tensor | None:
            found = []
            for chunk in chunks[rank() :: world]:
                with self._frozen():
                    pooled = text(text.trim(ids[chunk]).to(self._parameter().device)).pooled
                found.append(F.normalize(pooled.float(), dim=-1).cpu())
                bar.advance(len(chunk) * world)
            return torch.cat(found) if found else None

        rows = all_rows(together(share))
        assert rows is not None
        places = torch.cat([chunk for first in range(world) for chunk in chunks[first::world]])
        return torch.empty_like(rows).index_copy_(0, places, rows)

    # -- on disk -------------------------------------------------------------------------------------------------

    def _stored(self, key: str, compute: Callable[[], Tensor]) -> Tensor:
        """A tensor from disk, or computed and kept there; an empty ``key`` keeps nothing."""
        entry = self._entry(key)
        if entry is not None:
            return entry.tensors["rows"]
        rows = compute()
        self._to_disk(key, Entry({"rows": rows}))
        return rows

    def _entry(self, key: str) -> Entry | None:
        """What all ranks can read under ``key``."""
        entry = self._cache.read(key) if self._cache and key else None
        return None if not key or any_rank(entry is None) else entry

    def _from_disk(self, key: str, source: Source | PairSource) -> Pass | None:
        """A pass as it was kept, unless something can be read by now that could not be."""
        entry = self._entry(key)
        if entry is None:
            return None
        indices, first = entry.items["bad"]
        if any_rank(any(readable(source, index) for index in indices)):
            return None
        bad = BadSamples(len(source), set(indices), first)
        return Pass(entry.tensors["pooled"], entry.tensors.get("tokens"), from_records(entry.items["items"]), bad)

    def _to_disk(self, key: str, entry: Entry) -> None:
        if self._cache and key and rank() == 0 and (problem := self._cache.write(key, entry)):
            self._say(f"features are not kept: {problem}")

    def _image_key(self, source: Source | PairSource, tokens: bool) -> str:
        data = type(source).__qualname__, len(source), source.fingerprint
        return key_of("images", self._digest("image"), self.encoder.preprocess, data, tokens, *self._rounding())

    def _text_key(self, ids: Tensor, each: int = 0) -> str:
        """Weights are hashed only when someone outlives them."""
        weights = self._digest("text") if self._outlives or self._cache else ""
        given = tuple(ids.shape), ids.int().contiguous().numpy().tobytes()
        return key_of("texts", weights, each, *given, *self._rounding())

    def _rounding(self) -> tuple[str, ...]:
        return () if self.precision == "fp32" else (self.precision,)

    def _digest(self, tower: str) -> str:
        if tower not in self._digests:
            self._digests[tower] = tower_digest(getattr(self.encoder, tower), self.encoder.data)
        return self._digests[tower]

    def _say(self, line: str) -> None:
        if rank() == 0:
            (self.log.info if self.log else logging.getLogger("clipgraft").warning)(line)

    def _parameter(self) -> Tensor:
        """Has the device and dtype of the image tower."""
        return next(self.encoder.image.parameters())

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """No gradient (not inference_mode, under which autocast copies weights on every call) and eval mode."""
        modes = {module: module.training for module in self.encoder.modules()}
        self.encoder.eval()
        try:
            with torch.no_grad(), torch.autocast(self._parameter().device.type, BF16, enabled=self.precision == "bf16"):
                yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def _chunks(ids: Tensor, size: int, *, by_length: bool) -> list[Tensor]:
    """(n, L) ids -> their places in chunks of ``size`` at most, which hold one number of ids before the padding."""
    if not by_length:
        return list(torch.split(torch.arange(len(ids)), size))
    lengths = ids.shape[1] - (ids != ids[:, -1:]).flip(1).int().argmax(1)
    order = lengths.argsort(stable=True)
    counts = lengths.bincount()
    groups = torch.split(order, counts[counts > 0].tolist())
    return [chunk for group in groups for chunk in torch.split(group, size)]


def _merged(part: Pass) -> Pass:
    """The passes of all ranks as one, in source order."""
    pooled, tokens = all_rows(part.pooled), all_rows(part.tokens)
    rest = to_all((part.items, part.bad))
    bad = BadSamples(part.bad.total, set[int]().union(*(b.indices for _, b in rest)))
    bad.first = [line for _, b in rest for line in b.first][:10]
    return Pass(pooled, tokens, [item for items, _ in rest for item in items], bad)


def _rows(found: Pass) -> Tensor:
    assert found.pooled is not None  # a pass without rows was refused
    return found.pooled


def _blocks(prompts: list[str], size: int) -> Iterator[list[str]]:
    for first in range(0, len(prompts), size):
        yield prompts[first : first + size]
