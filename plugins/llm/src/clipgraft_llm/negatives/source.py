"""A source whose training samples bring wrong captions along, as token ids. K wrong captions, L text length."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Generator, Tensor

from clipgraft.data.base import Drawn, Entry, Listed, Sample, Source, entry_of, varied_of
from clipgraft.data.loader import class_prompts
from clipgraft.errors import InputError

Wrong = Callable[[Sample, str, random.Random], Sequence[str]]
"""A sample and the caption drawn for it -> wrong captions, best first or at random; maybe none."""


class WithNegatives:
    """``extra["negatives"]`` (K, L) token ids and ``extra["present"]`` (K,) bool beside their caption.

    The caption and its wrong ones are drawn together, anew in every epoch, by the loader's generator of the sample.
    """

    def __init__(
        self,
        source: Source,
        *,
        tokenizer: Callable[[Sequence[str]], Tensor],
        wrong: Wrong,
        count: int = 1,
        told: str = "",
    ) -> None:
        self.source, self.name = source, source.name
        self.classes: Sequence[str] = source.classes
        self.templates: Sequence[str] = source.templates
        self.attributes: Mapping[str, Sequence[str]] = source.attributes
        self.tokenizer, self.wrong, self.count = tokenizer, wrong, count
        self.fingerprint = hashlib.sha256(f"{source.fingerprint}|negatives|{count}|{told}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        return self.source[index]

    def varied(self, index: int, rng: Generator) -> Sample:
        """One caption, and at most K captions that are wrong where it is right."""
        sample = varied_of(self.source, index, rng)
        caption = self._caption(sample, rng)
        words = random.Random(int(torch.randint(2**31, (), generator=rng)))
        found = list(self.wrong(sample, caption, words))[: self.count]
        ids = self.tokenizer([*found, *[caption] * (self.count - len(found))])  # the filling is masked
        present = torch.arange(self.count) < len(found)
        extra = {**sample.extra, "negatives": ids, "present": present}
        return replace(sample, captions=(caption,), caption_weights=(), extra=extra)

    def _caption(self, sample: Sample, rng: Generator) -> str:
        captions, weights = sample.captions, sample.caption_weights
        if not captions and sample.label is not None and self.classes:
            captions = class_prompts(self.classes[sample.label], self.templates)
        if not captions:
            raise InputError(f"{self.name}: {sample.id} has no caption; train on a csv: with a caption column")
        share = torch.tensor(weights or [1.0] * len(captions), dtype=torch.float64)
        return captions[int(torch.multinomial(share, 1, generator=rng))]

    def entry(self, index: int) -> Entry:
        """Everything but the image."""
        return entry_of(self.source, index)

    def content(self, index: int) -> bytes:
        """The encoded image, where the source has one."""
        if not isinstance(self.source, Listed):
            raise LookupError(f"{self.name} holds no image files")
        return self.source.content(index)


class WithNegativesDrawn(WithNegatives):
    """The same of a source whose epochs hold planned amounts."""

    @property
    def quotas(self) -> Sequence[tuple[Sequence[int], int]]:
        """As the source plans them."""
        assert isinstance(self.source, Drawn)
        return self.source.quotas

    @property
    def together(self) -> int:
        """As the source wants them in one batch."""
        return int(getattr(self.source, "together", 0))


def with_negatives(
    source: Source, *, tokenizer: Callable[[Sequence[str]], Tensor], wrong: Wrong, count: int = 1, told: str = ""
) -> WithNegatives:
    """``source`` with wrong captions; ``told`` says in words how they are made, for the fingerprint."""
    kind = WithNegativesDrawn if isinstance(source, Drawn) else WithNegatives
    return kind(source, tokenizer=tokenizer, wrong=wrong, count=count, told=told)
