"""A long and a short caption for every image: what the two losses of Long-CLIP compare it with."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Literal

from clipgraft.data.base import BadSample, Drawn, Listed, Sample, Source, entry_of
from clipgraft.encoders.base import Tokenizer
from clipgraft.errors import InputError
from clipgraft_llm.captions.relayed import Quotas, Relayed
from clipgraft_llm.long_retrieval.cut import cut_tokens

Short = Literal["first-sentence", "second"]
SHORT = "short"
"""The key of ``Sample.extra`` and ``Batch.extra`` that holds the short caption's ids."""


def short_caption(captions: tuple[str, ...], short: Short) -> str | None:
    """Up to the first ". " of the first caption, or the second one; None where there is none."""
    if not captions:
        return None
    if short == "first-sentence":
        return captions[0].split(". ", 1)[0]
    return captions[1] if len(captions) > 1 else None


class TwoCaptions(Relayed):
    """The first caption of every sample, and ids (T,) of a short one in ``extra``; further captions are left out."""

    def __init__(self, source: Source, *, tokenizer: Tokenizer, short: Short) -> None:
        told = repr((source.fingerprint, short, tokenizer.context_length))
        super().__init__(source, name=source.name, fingerprint=hashlib.sha256(told.encode()).hexdigest())
        self.tokenizer, self.short = tokenizer, short

    def __getitem__(self, index: int) -> Sample:
        sample = self.source[index]
        short = short_caption(sample.captions, self.short)
        if short is None:
            raise InputError(f"{self.name}: {sample.id} {lacks(sample.captions, self.short)}")
        ids = self.tokenizer([short])[0]
        return replace(sample, captions=sample.captions[:1], caption_weights=(), extra={**sample.extra, SHORT: ids})


class TwoCaptionsDrawn(Quotas, TwoCaptions):
    """The same over a source with planned epochs."""


def two_captions(source: Source, *, tokenizer: Tokenizer, short: Short) -> TwoCaptions:
    """``source`` with a long and a short caption for each sample."""
    kind = TwoCaptionsDrawn if isinstance(source, Drawn) else TwoCaptions
    return kind(source, tokenizer=tokenizer, short=short)


def lacks(captions: tuple[str, ...], short: Short) -> str:
    """What a sample with ``captions`` has too little of, with the fix; empty if nothing."""
    if short_caption(captions, short) is not None:
        return ""
    if not captions:
        return "has no caption; Long-CLIP needs a long one for each image (csv: with a caption column)"
    return "has one caption, captions.short second needs two; set captions.short to first-sentence"


@dataclass(frozen=True, slots=True)
class Looked:
    """What the first samples of a source hold: ``problem`` with the first that can't be used, and counts of captions.

    ``cut`` long captions of ``count`` lose ``lost`` tokens in sum; ``single`` have no second sentence or caption.
    """

    problem: str
    count: int
    cut: int
    lost: int
    single: int
    longest: int

    def __str__(self) -> str:
        mean = f", {self.lost / self.cut:.0f} tokens each in the mean" if self.cut else ""
        return (
            f"of {self.count} captions looked at, the longest has {self.longest} tokens, {self.cut} are cut{mean}; in "
            f"{self.single} the short caption is the whole"
        )


def look(source: Source, *, tokenizer: Tokenizer, short: Short, most: int = 1000) -> Looked:
    """The first ``most`` samples (50 where captions are only had with their images)."""
    most = min(len(source), most if isinstance(source, Listed) else 50)
    found, problem = list[tuple[str, ...]](), ""
    for index in range(most):
        try:
            entry = entry_of(source, index)
        except BadSample:
            continue
        if (lack := lacks(entry.captions, short)) and not problem:
            problem = f"{source.name}: {entry.id} {lack}"
        found += [entry.captions] if not lack else []
    lengths = cut_tokens(tokenizer, [captions[0] for captions in found])
    single = sum(short_caption(captions, short) == captions[0] for captions in found)
    lost = [token.lost for token in lengths]
    longest = max((token.length for token in lengths), default=0)
    return Looked(problem, len(found), sum(n > 0 for n in lost), sum(lost), single, longest)
