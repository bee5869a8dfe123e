"""Wrong captions from right ones, by rule: words change places, or one is replaced by another of its kind.

Deviation: the official negatives come from a part-of-speech tagger (spaCy). Here a closed list of function words cuts
captions into phrases, so that nothing is downloaded; what a rule can't do to a caption it leaves out.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, pairwise
from typing import Literal

from clipgraft.errors import InputError
from clipgraft_llm.negatives.phrases import SYMMETRIC, Phrase, phrases, words_of

Rule = Literal["swap-heads", "swap-modifiers", "swap-phrases", "replace"]
RULES: tuple[Rule, ...] = ("swap-heads", "swap-modifiers", "swap-phrases", "replace")

_COLOURS = "red green blue yellow purple orange pink brown black white grey gray cyan"
_NUMBERS = "one two three four five six seven eight nine ten"
LEXICON: Mapping[str, tuple[str, ...]] = {
    "colours": tuple(_COLOURS.split()),
    "numbers": tuple(_NUMBERS.split()),
    "sizes": ("small", "large", "tiny", "huge"),
    "sides": ("left", "right"),
    "heights": ("above", "below"),
    "covers": ("over", "under"),
    "faces": ("front", "back"),
    "ages": ("old", "young"),
    "people": ("man", "woman"),
    "children": ("boy", "girl"),
    "light": ("dark", "bright"),
    "openness": ("open", "closed"),
    "presence": ("with", "without"),
    "insides": ("inside", "outside"),
    "posture": ("sitting", "standing", "lying"),
    "pace": ("walking", "running"),
}
"""Lists of words of one kind; ``replace`` exchanges a word for another one of its list."""


def wrong_captions(
    caption: str, rules: Sequence[Rule] = RULES, *, lexicon: Mapping[str, Sequence[str]] = LEXICON
) -> list[str]:
    """Every wrong caption that ``rules`` make, each once, in the order of the rules; the caption itself never."""
    places = words_of(caption)
    words = [m[0] for m in places]
    parts = phrases(words)
    found: dict[str, None] = {}
    for rule in rules:
        if rule not in MAKERS:
            raise InputError(f"unknown rule {rule!r}; rules are {', '.join(RULES)}")
        for changed in MAKERS[rule](words, parts, lexicon):
            text = _respelt(caption, places, changed)
            if text.lower() != caption.lower():
                found[text] = None
    return list(found)


def drawn(caption: str, rules: Sequence[Rule], count: int, *, rng: random.Random) -> list[str]:
    """At most ``count`` of the wrong captions, another rule for each as long as there is one."""
    by_rule = [wrong_captions(caption, (rule,)) for rule in rng.sample(list(rules), len(rules))]
    for options in by_rule:
        rng.shuffle(options)
    mixed = [options[k] for k in range(max(map(len, by_rule), default=0)) for options in by_rule if k < len(options)]
    return list(dict.fromkeys(mixed))[:count]


def _swap(words: list[str], one: range, other: range) -> list[str]:
    """Two runs of words in each other's place."""
    first, second = words[one.start : one.stop], words[other.start : other.stop]
    return [*words[: one.start], *second, *words[one.stop : other.start], *first, *words[other.stop :]]


def _differ(words: list[str], one: range, other: range) -> bool:
    return [words[k].lower() for k in one] != [words[k].lower() for k in other]


def _swap_heads(words: list[str], parts: list[Phrase], _: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """ "a red moon and a blue heart" -> "a red heart and a blue moon": wrong only if one of them has modifiers,

    or something asymmetric stands between them.
    """
    found = []
    for a, b in combinations(parts, 2):
        one, other = range(a.head, a.stop), range(b.head, b.stop)
        bare = not a.modifiers and not b.modifiers and _symmetric(words, a, b)
        if (
            not bare
            and _differ(words, one, other)
            and (_differ(words, a.modifiers, b.modifiers) or not _symmetric(words, a, b))
        ):
            found.append(_swap(words, one, other))
    return found


def _swap_modifiers(words: list[str], parts: list[Phrase], _: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """ "a red moon and a blue heart" -> "a blue moon and a red heart"; equal heads leave it true."""
    return [
        _swap(words, a.modifiers, b.modifiers)
        for a, b in combinations(parts, 2)
        if _differ(words, a.modifiers, b.modifiers) and _differ(words, range(a.head, a.stop), range(b.head, b.stop))
    ]


def _swap_phrases(words: list[str], parts: list[Phrase], _: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """ "a cat on a mat" -> "a mat on a cat"; not around "and" and the like, where it stays true."""
    return [
        _swap(words, range(a.start, a.stop), range(b.start, b.stop))
        for a, b in combinations(parts, 2)
        if not _symmetric(words, a, b) and _differ(words, a.content, b.content)
    ]


def _symmetric(words: list[str], a: Phrase, b: Phrase) -> bool:
    return tuple(w.lower() for w in words[a.stop : b.start]) in SYMMETRIC


def _replace(words: list[str], _: list[Phrase], lexicon: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """A word for each other one of every list that has it; none that the caption says elsewhere."""
    said = {word.lower() for word in words}
    found = []
    for k, word in enumerate(words):
        for kind in lexicon.values():
            if word.lower() in kind:
                others = [other for other in kind if other not in said]
                found += [[*words[:k], other, *words[k + 1 :]] for other in others]
    return found


def _respelt(caption: str, places: Sequence[re.Match[str]], words: list[str]) -> str:
    """The changed words with the caption's spaces and its first capital; "a" or "an" as the next word had it before."""
    old = [m[0] for m in places]
    told = {b.lower(): a.lower() for a, b in pairwise(old) if a.lower() in ("a", "an")}
    if words[0] != old[0] and old[0][:1].isupper():
        words = [word.lower() if word == old[0] else word for word in words]
        words[0] = words[0][:1].upper() + words[0][1:]
    for k, (article, word) in enumerate(pairwise(words)):
        if article.lower() in ("a", "an") and old[k + 1 : k + 2] != [word]:
            right = told.get(word.lower(), "an" if word[0].lower() in "aeiou" else "a")
            words[k] = right.capitalize() if article[0].isupper() else right
    ends = [0, *(m.end() for m in places)]
    gaps: dict[bool, list[str]] = {True: [], False: []}  # before words, before punctuation: neither overtakes the other
    for end, m in zip(ends, places, strict=False):
        gaps[m[0][0].isalnum()].append(caption[end : m.start()])
    spaces = {kind: iter(found) for kind, found in gaps.items()}
    return "".join(next(spaces[word[0].isalnum()]) + word for word in words) + caption[ends[-1] :]


MAKERS: Mapping[str, Callable[[list[str], list[Phrase], Mapping[str, Sequence[str]]], list[list[str]]]] = {
    "swap-heads": _swap_heads,
    "swap-modifiers": _swap_modifiers,
    "swap-phrases": _swap_phrases,
    "replace": _replace,
}
