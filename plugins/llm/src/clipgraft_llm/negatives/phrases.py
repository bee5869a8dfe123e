"""A caption cut into noun phrases by a closed list of function words: a shallow chunker, no tagger, no model.

"a red moon on the left of a heart" -> phrases [a | red | moon], [the | left], [a | heart] between connectors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_DETERMINERS = (
    "a an the this that these those his her its their our my your some any each every another two three four five six "
    "seven eight nine ten several many few"
)
_CONNECTORS = (
    "and or but of in on at by to from with without for over under above below behind beside between near into onto "
    "off through across along around against before after next while as than like is are was were be been being has "
    "have had which who where there here it not no"
)
DETERMINERS, CONNECTORS = frozenset(_DETERMINERS.split()), frozenset(_CONNECTORS.split())
SYMMETRIC = frozenset(
    {("and",), ("or",), (",",), (",", "and"), ("with",), ("near",), ("beside",), ("next", "to"), ("and", "also")}
)
"""Connectors around which two phrases may change places without making the caption wrong."""
TOKEN = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*|[^\w\s]|_")


@dataclass(frozen=True, slots=True)
class Phrase:
    """A run of words ``start``..``stop`` of a caption: maybe a determiner, modifiers, and the head at the end."""

    start: int
    stop: int
    determiner: bool

    @property
    def head(self) -> int:
        """Place of the last word."""
        return self.stop - 1

    @property
    def modifiers(self) -> range:
        """Places between determiner and head."""
        return range(self.start + self.determiner, self.head)

    @property
    def content(self) -> range:
        """Modifiers and head."""
        return range(self.start + self.determiner, self.stop)


def words_of(caption: str) -> list[re.Match[str]]:
    """Words and single punctuation marks, with their places in the caption."""
    return list(TOKEN.finditer(caption))


def phrases(words: list[str]) -> list[Phrase]:
    """Runs of content words, each with the determiner before it; connectors and punctuation end a phrase."""
    found, start = list[Phrase](), None
    for k, word in enumerate([*words, "."]):
        low = word.lower()
        content = low not in CONNECTORS and low not in DETERMINERS and word[0].isalnum()
        if content and start is None:
            start = k
        elif not content and start is not None:
            determiner = start > 0 and words[start - 1].lower() in DETERMINERS
            found.append(Phrase(start - determiner, k, determiner))
            start = None
    return found
