"""Class-name filtering: names that a CLIP can't know, such as "pcb1", become "object" before they get into a prompt.

The paper has such a filter; its rule isn't known to us, so everything here is our own choice (reconstruction).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional as F

from clipgraft.config.schema import Config
from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft_anomaly.handwritten import UNNAMED

_NOUNS = (
    "apple bag ball basket bed bell belt bench bicycle bird blanket boat book boot bottle bowl box bread "
    "brick bridge brush bucket button cable camera candle car carpet chair clock cloth coat coin cup curtain "
    "desk dish door dress drum egg fabric fence flag floor flower fork glass glove hammer hat helmet jacket "
    "jar kettle key knife ladder lamp leaf leather lock metal mirror nail needle nut orange paper pen pencil "
    "phone pill pillow pipe plate ring road rope sandal screw shelf shirt shoe sign spoon stone table tile "
    "tire tool towel toy tree truck umbrella wall watch wheel window wire wood zipper"
)
NOUNS = tuple(_NOUNS.split())
"""Everyday things, for the distribution of cosines that a name is judged by."""


class FilterConfig(Config):
    """Which names are doubted, and what becomes of them."""

    mode: Literal["off", "rule", "cosine"] = Field(
        "rule", description="off: every name is kept; rule: spelling and pieces; cosine: these, then likeness to object"
    )
    underscores: Literal["reject", "space"] = Field(
        "reject", description="a name with underscores is a label, not a word; space: they are read as spaces"
    )
    pieces: int = Field(3, gt=0, description="most tokens that one word of a known name may take")
    quantile: float = Field(
        0.05, ge=0, le=1, description="of the nouns' cosines to object; a name below it is doubted (mode cosine)"
    )
    nouns: tuple[str, ...] = Field(NOUNS, min_length=2, description="common nouns, for the quantile")
    sentence: str = Field("a photo of a {}.", description="what is said about names and nouns for their cosines")
    weight: float = Field(
        0.0, ge=0, le=1, description="share of a doubted name's own text beside that of object; 0 replaces the name"
    )

    @field_validator("sentence")
    @classmethod
    def _one_place(cls, value: str) -> str:
        if value.count("{}") != 1:
            raise ValueError(f"{value!r} must hold {{}} once, where the name goes")
        return value


@dataclass(frozen=True, slots=True)
class Told:
    """What a prompt says: ``weight`` times the text of ``name`` and the rest of "object"; ``reason`` of a doubt."""

    name: str
    weight: float = 1.0
    reason: str = field(default="", compare=False)


class NameFilter:
    """Name -> ``Told``; the same name always gives the same, and what it gives is kept when asked about again.

    Each doubted name is said once on ``log`` and kept with its reason in ``doubted``.
    """

    def __init__(self, encoder: Encoder, settings: FilterConfig, *, log: Callable[[str], None] | None = None) -> None:
        self.encoder, self.settings, self.log = encoder, settings, log
        self.doubted: dict[str, str] = {}
        self._known: dict[str, Told] = {}
        self._least: float | None = None

    def __call__(self, name: str) -> Told:
        """As the class says."""
        if name not in self._known:
            self._known[name] = self._judged(name)
        return self._known[name]

    def _judged(self, name: str) -> Told:
        reason, plain = self.doubt(name), " ".join(name.replace("_", " ").split()) or UNNAMED
        if not reason:
            return Told(plain)
        self.doubted[name] = reason
        weight = self.settings.weight
        if self.log is not None:
            instead = f"{UNNAMED!r}" if not weight else f"{weight:g} of it beside {UNNAMED!r}"
            self.log(f"prompts say {instead} instead of {name!r}: {reason}")
        return Told(plain, weight, reason) if weight else Told(UNNAMED, reason=reason)

    def doubt(self, name: str) -> str:
        """Why a name is doubted; empty when it is kept. "object" always is."""
        how = self.settings
        if how.mode == "off" or name == UNNAMED:
            return ""
        if any(c.isdigit() for c in name):
            return "it holds digits"
        if "_" in name and how.underscores == "reject":
            return "it holds underscores"
        for word in name.replace("_", " ").split():
            if (pieces := self.pieces(word)) > how.pieces:
                return f"{word!r} takes {pieces} tokens, known words take {how.pieces} at most"
        if how.mode == "cosine":
            likeness, least = float(self.likeness([name])[0]), self.least
            if likeness < least:
                return f"its cosine to {UNNAMED!r} of {likeness:.3f} is below {least:.3f}"
        return ""

    def pieces(self, word: str) -> int:
        """Tokens of a word, without start and end."""
        return int(self.encoder.tokenizer([word])[0].argmax()) - 1

    @property
    def least(self) -> float:
        """The quantile of the nouns' cosines."""
        if self._least is None:
            self._least = float(torch.quantile(self.likeness(self.settings.nouns), self.settings.quantile))
        return self._least

    @torch.no_grad()
    def likeness(self, names: tuple[str, ...] | list[str]) -> Tensor:
        """Cosines (n,) of sentences about names to the sentence about "object"."""
        text: Any = self.encoder.text
        if text is None:
            raise InputError("filter.mode cosine needs a text tower, this model has none; set filter.mode=rule")
        told = [self.settings.sentence.replace("{}", n.replace("_", " ")) for n in (UNNAMED, *names)]
        ids = self.encoder.tokenizer(told).to(next(text.parameters()).device)
        found = F.normalize(text(text.trim(ids)).pooled.float(), dim=-1).cpu()
        return found[1:] @ found[0]
