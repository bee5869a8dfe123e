"""``llm/captions:FILE``: rewritten captions beside a source's own, each version drawn with its share.

LaCLIP (Fan et al., Improving CLIP Training with Language Rewrites, NeurIPS 2023, arXiv 2305.20088) draws the original
or one of its rewrites, all equally often; VeCLIP (Lai et al., ECCV 2024, arXiv 2310.07699) mixes both.
"""

from __future__ import annotations

import hashlib
import logging
import math
from dataclasses import replace
from pathlib import Path

from pydantic import Field

from clipgraft.config.schema import Config
from clipgraft.data import open_source
from clipgraft.data.base import BadSample, Drawn, Entry, Sample, Source, entry_of
from clipgraft.data.images import MAX_PIXELS
from clipgraft.errors import InputError, unknown_name
from clipgraft_llm.captions.relayed import Quotas, Relayed
from clipgraft_llm.captions.rewrites import Rewrites, read_rewrites


class CaptionsConfig(Config):
    """``captions:FILE?from=REFERENCE``."""

    path: str = Field(description="rewrites: .jsonl, .csv or .tsv with an id per row and a column per version")
    from_: str = Field(alias="from", description="data reference whose samples get them; write ; for an & in it")
    versions: str | None = Field(None, description="columns to take, with shares: llama:0.3,chat:0.2; null: all")
    original: float | None = Field(
        None, ge=0, le=1, description="share of the source's own captions; null: every text is drawn equally often"
    )
    missing: float = Field(0.01, ge=0, le=1, description="share of samples that may lack rewrites and keep their own")
    max_pixels: int = Field(MAX_PIXELS, gt=0, description="larger images are refused; data.max_pixels sets it [pixels]")


def captions(
    *,
    path: str,
    from_: str,
    versions: str | None = None,
    original: float | None = None,
    missing: float = 0.01,
    max_pixels: int = MAX_PIXELS,
) -> Rewritten:
    """The source of ``from`` with the captions of the file."""
    name = f"captions:{path}"
    if from_.startswith(("captions:", "llm/captions:")):
        raise InputError(f"{name}: from names rewrites itself; put all versions into one file")
    source = open_source(from_.replace(";", "&"), max_pixels=max_pixels)
    if hasattr(source, "patterns"):
        raise InputError(f"{name}: {from_} holds minimal pairs; captions belong to single images")
    rewrites = read_rewrites(path, name=name)
    shares = _shares(versions, {version for row in rewrites.values() for version in row}, original, name)
    _compare(source, rewrites, shares, missing=missing, name=name)
    content = hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()
    told = repr((source.fingerprint, content, sorted(shares.items()), original))
    kind = RewrittenDrawn if isinstance(source, Drawn) else Rewritten
    fingerprint = hashlib.sha256(told.encode()).hexdigest()
    return kind(source, rewrites, shares=shares, original=original, name=name, fingerprint=fingerprint)


class Rewritten(Relayed):
    """Own captions first, then the versions' in the order of ``shares``, all with ``caption_weights``.

    A version that a sample lacks leaves its share to its other versions, and all of them to the sample's own captions.
    """

    def __init__(
        self,
        source: Source,
        rewrites: Rewrites,
        *,
        shares: dict[str, float],
        original: float | None,
        name: str,
        fingerprint: str,
    ) -> None:
        super().__init__(source, name=name, fingerprint=fingerprint)
        self.rewrites, self.shares, self.original = rewrites, shares, original

    def __getitem__(self, index: int) -> Sample:
        sample = self.source[index]
        texts, weights = self._told(sample.id, sample.captions, sample.caption_weights)
        return replace(sample, captions=texts, caption_weights=weights)

    def entry(self, index: int) -> Entry:
        """Everything but the image."""
        entry = entry_of(self.source, index)
        return replace(entry, captions=self._told(entry.id, entry.captions, ())[0])

    def _told(
        self, name: str, own: tuple[str, ...], weights: tuple[float, ...]
    ) -> tuple[tuple[str, ...], tuple[float, ...]]:
        """Captions and how often each is drawn, adding up to one."""
        row = self.rewrites.get(name, {})
        parts = {version: row[version] for version in self.shares if version in row}
        if not parts:
            return own, weights
        texts = own + tuple(text for part in parts.values() for text in part)
        own_weights = weights or (1.0,) * len(own)
        if self.original is None:
            each = [len(own) * w / sum(own_weights) for w in own_weights] + [1.0] * (len(texts) - len(own))
            return texts, tuple(w / len(texts) for w in each)
        original = self.original if own else 0.0
        rest = sum(self.shares[version] for version in parts)
        if not rest:  # the versions that are there have no share
            return texts, tuple(w / sum(own_weights) for w in own_weights) + (0.0,) * (len(texts) - len(own))
        spread = [
            (1 - original) * self.shares[version] / rest / len(part) for version, part in parts.items() for _ in part
        ]
        return texts, tuple([original * w / sum(own_weights) for w in own_weights] + spread)


class RewrittenDrawn(Quotas, Rewritten):
    """The same over a source with planned epochs."""


def _shares(text: str | None, known: set[str], original: float | None, name: str) -> dict[str, float]:
    """{version: weight} of ``versions``; all versions, weighing the same, without it."""
    if text is None:
        return dict.fromkeys(sorted(known), 1.0)
    found, weighted = dict[str, float](), False
    for part in text.split(","):
        version, colon, weight = part.strip().partition(":")
        weighted |= bool(colon)
        try:
            found[version] = float(weight) if colon else 1.0
        except ValueError:
            found[version] = -1.0
        if not version or not 0 <= found[version] < math.inf:
            raise InputError(f"{name}: {part.strip()!r} names no version; write COLUMN or COLUMN:SHARE, as llama:0.3")
        if version not in known:
            raise unknown_name(f"version in {name}", version, known)
    if not sum(found.values()):
        raise InputError(f"{name}: all shares of versions are zero; give one that is not")
    if weighted and original is None:
        raise InputError(f"{name}: versions have shares, the source's own captions have none; add original=0.5")
    return found


def _compare(source: Source, rewrites: Rewrites, shares: dict[str, float], *, missing: float, name: str) -> None:
    """Refuse a file that lacks too many samples; tell how many it lacks."""
    lacking, example = list[str](), ""
    for index in range(len(source)):
        try:
            example = entry_of(source, index).id
        except BadSample:
            continue
        if not any(version in rewrites.get(example, {}) for version in shares):
            lacking.append(example)
    if len(lacking) > missing * len(source):
        hint = f"ids there look like {next(iter(rewrites))}" if len(lacking) == len(source) else "raise missing"
        raise InputError(
            f"{name}: no rewrite for {len(lacking)} of {len(source)} samples of {source.name}, such as {lacking[0]}; "
            f"{hint}, or write the missing ones"
        )
    if lacking:
        more = ", ..." if len(lacking) > 3 else ""
        logging.getLogger("clipgraft").warning(
            f"{name}: {len(lacking)} of {len(source)} samples keep their own captions: {', '.join(lacking[:3])}{more}"
        )
