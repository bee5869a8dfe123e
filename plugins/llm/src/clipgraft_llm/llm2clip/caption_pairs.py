"""Captions without pictures as training batches: two captions of one sample, and one of another.

B pairs, L tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Generator, Tensor

from clipgraft.data.base import BadSample, Entry, Sample, Source, entry_of
from clipgraft.data.sampling import seeded
from clipgraft.errors import InputError
from clipgraft.log import RunLog
from clipgraft_llm.cache.build import captions_of
from clipgraft_llm.tower.caption_tokens import CaptionTokenizer

LOOKED_AT = 20
"""Samples that are tried until one can be read."""
BETWEEN = "\x1f"
"""Unit separator: between the texts of a row on their way through the loader."""


def why_no_captions(source: Source, *, needed: int) -> str:
    """Why a source doesn't do, seen on the first sample that can be read; empty when it does."""
    for index in range(min(len(source), LOOKED_AT)):
        try:
            entry = entry_of(source, index)
        except BadSample:
            continue
        found = captions_of(source, entry)
        if len(set(found)) >= needed:
            return ""
        if found and needed > 1:
            return (
                f"{source.name} has {len(set(found))} caption of {entry.id}; {needed} that differ are needed per "
                "sample (rows with the same image in a csv:)"
            )
        return f"{source.name} has no caption of {entry.id}; give a csv: with a caption column"
    return ""  # the loader says what is wrong with them


class CaptionPairs:
    """A source of texts: the one caption of a sample is two of its captions, in either order, and a further text.

    All are drawn anew in every epoch. The further text is one of the sample's own ``negatives`` where it has some; else
    a caption of another sample, the one in the same place as the positive among that sample's (short stays with short,
    long with long). Samples with fewer than two different captions are left out and counted.
    """

    def __init__(self, source: Source, *, negatives: bool, seed: int, log: RunLog) -> None:
        self.name, self.classes, self.templates = source.name, source.classes, source.templates
        self.attributes: Mapping[str, Sequence[str]] = {}
        self.negatives, self.seed, self.left_out = negatives, seed, 0
        self._rows: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = []
        with log.progress("captions", len(source)) as bar:
            for index in range(len(source)):
                self._add(source, index)
                bar.advance()
        if self.left_out:
            log.info(f"{self.left_out} of {len(source)} samples of {self.name} have no two captions and are left out")
        if len(self._rows) < 2:
            raise InputError(f"{self.name} has fewer than two samples with two captions; add captions per sample")
        digest = hashlib.sha256(f"{source.fingerprint} pairs {negatives} {seed}".encode())
        self.fingerprint = digest.hexdigest()
        self._blank = torch.zeros(3, 1, 1, dtype=torch.uint8)

    def _add(self, source: Source, index: int) -> None:
        try:
            entry = entry_of(source, index)
        except BadSample:
            self.left_out += 1
            return
        captions = tuple(dict.fromkeys(c.replace(BETWEEN, " ") for c in captions_of(source, entry) if c.strip()))
        wrong: tuple[str, ...] = tuple(getattr(entry, "negatives", ()))
        if len(captions) < 2:
            self.left_out += 1
        else:
            self._rows.append((entry.id, captions, wrong))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        return self.varied(index, seeded(self.seed, 0, index))

    def varied(self, index: int, rng: Generator) -> Sample:
        """As ``rng`` draws it."""
        name, captions, _ = self._rows[index]
        query, positive = torch.randperm(len(captions), generator=rng)[:2].tolist()
        told = [captions[query], captions[positive], *self._negative(index, positive, rng)]
        return Sample(name, self._blank, (BETWEEN.join(told),))

    def _negative(self, index: int, place: int, rng: Generator) -> list[str]:
        if not self.negatives:
            return []
        if wrong := self._rows[index][2]:
            return [wrong[int(torch.randint(len(wrong), (), generator=rng))].replace(BETWEEN, " ")]
        other = int(torch.randint(len(self._rows) - 1, (), generator=rng))
        captions = self._rows[other + (other >= index)][1]
        return [captions[place % len(captions)]]

    def entry(self, index: int) -> Entry:
        """Id and captions."""
        name, captions, _ = self._rows[index]
        return Entry(name, captions)

    def content(self, index: int) -> bytes:
        """There are no pictures."""
        raise LookupError(f"{self.name}: captions alone")


class PairTokenizer:
    """Rows of ``CaptionPairs`` -> ids (B, 2 or 3, L): query, positive and maybe negative.

    ``instructed`` tokenises queries where they get an instruction before them.
    """

    def __init__(self, tokens: CaptionTokenizer, *, instructed: CaptionTokenizer | None = None) -> None:
        self.tokens, self.instructed = tokens, instructed or tokens
        self.context_length, self.pad_id = tokens.context_length, tokens.pad_id

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(B, 2 or 3, L) int64."""
        columns = list(zip(*(text.split(BETWEEN) for text in texts), strict=True))
        ids: list[Tensor] = [self.instructed(columns[0]), *(self.tokens(column) for column in columns[1:])]
        return torch.stack(ids, 1)

    def save(self, folder: str) -> None:
        """Nothing: this never travels with a model."""
