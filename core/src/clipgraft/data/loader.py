"""Batches: exact by construction in training, once through in evaluation; unreadable samples are counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from itertools import chain, count
from typing import Any

import torch
from torch import Generator
from torch.utils.data import DataLoader

from clipgraft.data.base import BadSample, Pair, PairSource, Sample, Source, varied_of
from clipgraft.data.images import checked_weights
from clipgraft.data.reading import read
from clipgraft.data.reading import stack_images as stack_images
from clipgraft.data.sampling import Plan, epoch_order, seeded
from clipgraft.data.transforms import evaluation_transform, training_transform
from clipgraft.encoders.base import Preprocess, Tokenizer
from clipgraft.errors import ClipgraftError, InputError
from clipgraft.types import Batch

DEFAULT_TEMPLATES = ("a photo of a {}.",)


def class_prompts(name: str, templates: Sequence[str] = ()) -> tuple[str, ...]:
    """A class name, its underscores read as spaces, in every template (``DEFAULT_TEMPLATES`` without any)."""
    if bad := [template for template in templates if template.count("{}") != 1]:
        raise InputError(f"template {bad[0]!r} must hold {{}} once, where the class name goes")
    return tuple(template.replace("{}", name.replace("_", " ")) for template in templates or DEFAULT_TEMPLATES)


@dataclass(slots=True)
class BadSamples:
    """Distinct unreadable samples of ``total``; ``first`` names ten of them with the reason."""

    total: int
    indices: set[int] = field(default_factory=set)
    first: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many so far."""
        return len(self.indices)

    def add(self, index: int, error: BadSample) -> None:
        """Count a sample once."""
        self.first += [str(error)] if index not in self.indices and self.count < 10 else []
        self.indices.add(index)

    def __str__(self) -> str:
        more = "; ..." if self.count > 3 else ""
        return f"{self.count} of {self.total} samples can't be read: {'; '.join(self.first[:3])}{more}"


@dataclass
class TrainLoader:
    """Endless batches; number n on a rank is a pure function of (seed, n, rank), in the order of ``epoch_order``.

    ``batch_size`` samples per rank; a global batch of ``batch_size * world`` holds the same augmented samples whatever
    ``world`` is, and the last incomplete one of an epoch is dropped. ``crop`` None takes the evaluation transform;
    ``Sample.extra`` is never cropped along. With a tokenizer, ``Batch.text`` is one caption per sample drawn by weight;
    class names in the source's templates stand in for captions. An unreadable sample is replaced, by one from outside
    the global batch if there is any; more than ``max_bad`` (share of the source, counted on this rank) are an error.
    """

    source: Source
    _: KW_ONLY
    preprocess: Preprocess
    tokenizer: Tokenizer | None = None
    batch_size: int
    seed: int
    rank: int = 0
    world: int = 1
    crop: tuple[float, float] | None = (0.9, 1.0)
    workers: int = 0
    max_bad: float = 0.01
    plan: Plan | None = None

    def __post_init__(self) -> None:
        self.drawn = self.plan or Plan(len(self.source))
        self.size, total = self.batch_size * self.world, self.drawn.size
        if total < self.size:
            raise InputError(
                f"{self.source.name} has {total} samples, fewer than one batch of {self.size}; add samples or set "
                f"batch_size to {total} or less"
            )
        self.steps_per_epoch, self.allowed = total // self.size, self.max_bad * len(self.source)
        self._plain = evaluation_transform(self.preprocess)
        self._augmented = training_transform(self.preprocess, self.crop) if self.crop else None
        self._order = -1, torch.empty(0)
        self.load_state_dict({})

    def iterate(self, start: int = 0) -> Iterator[Batch]:
        """Batches from number ``start`` on. The global random state is neither read nor changed."""
        found: Iterable[Any] = map(self.__getitem__, count(start))
        if self.workers:
            own = Generator()  # without it the DataLoader draws from the global one
            batches: Any = self
            found = DataLoader(batches, None, sampler=count(start), num_workers=self.workers, generator=own)
        for batch, bad in found:
            for index, error in bad.items():
                self.bad.add(index, error)
            if isinstance(batch, ClipgraftError):
                raise batch
            if batch is None or self.bad.count > self.allowed:
                raise InputError(f"{self.source.name}: {self.bad}; repair or remove them, or raise data.max_bad")
            yield batch

    def __getitem__(self, number: int) -> tuple[Batch | ClipgraftError | None, dict[int, BadSample]]:
        """Batch ``number`` of this rank (None when too little can be read) and what could not be read on the way.

        Errors are returned, because crossing a worker process would wrap them into many lines.
        """
        epoch, place = divmod(number, self.steps_per_epoch)
        lanes = range(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        bad: dict[int, BadSample] = {}
        try:
            rows = [row for lane in lanes if (row := self._row(epoch, place * self.size, lane, bad)) is not None]
            return self._collate(rows) if len(rows) == self.batch_size else None, bad
        except ClipgraftError as error:
            return error, bad

    def _row(self, epoch: int, first: int, lane: int, bad: dict[int, BadSample]) -> Sample | None:
        """The sample of one lane of the global batch that starts at ``first``, as pixels with one caption."""
        if self._order[0] != epoch:
            self._order = epoch, epoch_order(self.drawn, seed=self.seed, epoch=epoch)
        order = self._order[1]
        outside = len(order) - self.size
        spare = (first + self.size + (lane + k * self.size) % outside for k in range(outside))
        for place in chain([first + lane], spare, range(first + lane, first + lane + len(order))):
            index = int(order[place % len(order)])
            if len(bad) > self.allowed:
                return None
            rng = seeded(self.seed, epoch, index)
            try:
                sample = varied_of(self.source, index, rng)
            except BadSample as error:
                bad[index] = error
                continue
            caption = self._caption(sample, rng) if self.tokenizer else ()
            pixels = self._augmented(sample.image, rng) if self._augmented else self._plain(sample.image)
            return replace(sample, image=pixels, captions=caption)
        return None

    def _caption(self, sample: Sample, rng: Generator) -> tuple[str]:
        captions, weights = sample.captions, sample.caption_weights
        if not captions and sample.label is not None and self.source.classes:
            captions = class_prompts(self.source.classes[sample.label], self.source.templates)
        if not captions:
            raise InputError(f"{self.source.name}: {sample.id} has no caption; train on a csv: with a caption column")
        if not weights:
            return (captions[int(torch.randint(len(captions), (), generator=rng))],)
        try:
            share = torch.tensor(checked_weights(captions, weights), dtype=torch.float64)
        except ValueError as error:
            raise InputError(f"{self.source.name}: {sample.id}: {error}") from None
        return (captions[int(torch.multinomial(share, 1, generator=rng))],)

    def _collate(self, rows: Sequence[Sample]) -> Batch:
        labels = [row.label for row in rows if row.label is not None]
        attributes = [k for k in rows[0].attributes if all(k in row.attributes for row in rows)]
        extra = [k for k in rows[0].extra if all(k in row.extra for row in rows)]
        return Batch(
            pixels=stack_images(rows),
            ids=[row.id for row in rows],
            text=self.tokenizer([row.captions[0] for row in rows]) if self.tokenizer else None,
            labels=torch.tensor(labels) if len(labels) == len(rows) else None,
            attributes={k: torch.tensor([row.attributes[k] for row in rows]) for k in attributes},
            extra={k: torch.stack([row.extra[k] for row in rows]) for k in extra},
        )

    def state_dict(self) -> dict[str, Any]:
        """What was unreadable so far, as plain JSON types; the position is the step."""
        return {"bad": sorted(self.bad.indices), "first": list(self.bad.first)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue counting from ``state_dict()``; an empty mapping starts anew."""
        self.bad = BadSamples(len(self.source), set(state.get("bad", ())), list(state.get("first", ())))


def evaluation_batches(
    source: Source | PairSource,
    *,
    preprocess: Preprocess,
    batch_size: int,
    bad: BadSamples,
    workers: int | None = 0,
    rank: int = 0,
    world: int = 1,
) -> Iterator[list[Sample | Pair]]:
    """Every readable item once, in order, without ``extra``, its images as pixels for ``stack_images``.

    A batch holds the readable items of ``batch_size`` places of the source, so that it is the same whatever ``workers``
    and ``world`` are; the others go to ``bad``. A rank gets a run of whole batches. ``workers`` None starts as many as
    there are cores, when reading the rest here would take seconds. The global random state stays as it is.
    """
    starts = range(0, len(source), batch_size)
    starts = starts[rank * len(starts) // world : (rank + 1) * len(starts) // world]
    batches = [range(start, min(start + batch_size, len(source))) for start in starts]
    for part in read(source, evaluation_transform(preprocess), batches, workers=workers, world=world):
        for index, error in part.bad.items():
            bad.add(index, error)
        if part.items:
            yield part.items
