"""Number words of a caption: which captions count, and the same caption with another number.

Whole words only: "often", "tenth" and "2010" hold no number word.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
"""2 to 10; "one" is left out, because it seldom counts ("one of", "no one")."""
_DIGITS = {str(k): word for k, word in enumerate(NUMBERS, 2)}
_WORD = re.compile(rf"(?<![\w.,'’-])(?:{'|'.join([*NUMBERS, *_DIGITS])})(?![\w'’-]|[.,]\d)", re.IGNORECASE)


def number_in(caption: str) -> re.Match[str] | None:
    """The only number of a caption, as a word or digits; None without one or with several."""
    found = list(_WORD.finditer(caption))
    return found[0] if len(found) == 1 else None


def value_of(match: re.Match[str]) -> int:
    """2 to 10."""
    word = match[0].lower()
    return NUMBERS.index(_DIGITS.get(word, word)) + 2


def recounted(caption: str, match: re.Match[str], number: int) -> str:
    """The caption with ``number`` where the match is, spelt as it was: digits, a capital."""
    old, new = match[0], NUMBERS[number - 2]
    new = (
        str(number)
        if old.isdecimal()
        else new.upper()
        if old.isupper()
        else new.capitalize()
        if old[0].isupper()
        else new
    )
    return caption[: match.start()] + new + caption[match.end() :]


def other_counts(caption: str, numbers: Sequence[int] = range(2, 11)) -> list[str]:
    """The caption with every other one of ``numbers``; empty unless it holds exactly one number."""
    match = number_in(caption)
    if match is None:
        return []
    return [recounted(caption, match, k) for k in numbers if k != value_of(match)]


def drawn_counts(caption: str, count: int, *, rng: random.Random, numbers: Sequence[int] = range(2, 11)) -> list[str]:
    """At most ``count`` of them."""
    options = other_counts(caption, numbers)
    return rng.sample(options, min(count, len(options)))
