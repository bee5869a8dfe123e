"""What is said about a scene: short captions that leave most out, long ones that name everything, stories, statements.

Three tiers of words. *Plain* words are what image captions use. *Paraphrases* appear in complete captions, so text
towers have met them. *Rare* words and negations appear in no image caption at all: only the text teacher knows them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from clipgraft_toyworld.world import COLORS, DETAILS, SHAPES, Scene

TEMPLATES = ("{}", "a {}", "a photo of a {}", "picture of a {}", "the {}")
"""Prompts with one place for a class name; all of them occur in captions."""

PARAPHRASES: dict[str, tuple[str, ...]] = {
    "orientation": ("standing", "on its head"),
    "presence": ("no outline", "has outline"),
    "state": ("in one piece", "cut in half"),
    "quantity": ("single", "a pair", "a trio"),
    "position": ("left side", "right side", "upper side", "lower side"),
    "background": ("over black", "over gray", "over white", "over brown"),
    "texture": ("no pattern", "has stripes", "has checks"),
    "glyph": ("letter x", "letter o", "letter t", "letter l"),
    "perspective": ("distant", "near"),
}
RARE: dict[str, tuple[str, ...]] = {
    "shape": ("pyramid", "dart", "valentine", "crescent", "mallet", "ladle", "boot", "tiara"),
    "color": ("crimson", "emerald", "azure", "golden", "violet", "turquoise", "amber", "rosy"),
    "orientation": ("erect", "inverted"),
    "presence": ("unframed", "framed"),
    "state": ("intact", "severed"),
    "quantity": ("solitary", "couple", "triple"),
    "position": ("westernmost", "easternmost", "northernmost", "southernmost"),
    "background": ("midnight scene", "ashen scene", "snowy scene", "earthen scene"),
    "texture": ("smooth", "banded", "mosaic"),
    "glyph": ("marked ex", "marked oh", "marked tea", "marked elle"),
    "perspective": ("remote", "nearby"),
}
DEFECTS = ("scratch", "hole", "stain", "missing part")
"""Kinds of damage; a text tower meets them as "with a scratch"."""
MOTIONS = (
    "moving left",
    "moving right",
    "moving up",
    "moving down",
    "growing",
    "shrinking",
    "turning clockwise",
    "turning counterclockwise",
    "fading in",
    "fading out",
)
"""Classes of the videos, opposites side by side."""
PERFECT = ("flawless", "perfect", "normal", "good", "unblemished", "without flaw", "without defect", "without damage")
DAMAGED = ("damaged", "broken", "defective", "blemished", "with flaw", "with defect", "with damage")
"""Words for an object's condition that text towers meet beside the kinds of damage."""
STYLES = ("bright", "dark", "blurry", "cropped", "clean", "bad", "small", "large")
"""Words before "photo" in prompts of the literature; text towers meet them, they mean nothing here."""
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SENTENCES = (
    "the object is {}",
    "this object is {}",
    "there is an object {}",
    "in this picture the object is {}",
    "the object in my photo is {}",
)
"""What a story says about one detail; all words occur in other captions."""
_FILLERS = "a an the this that is there my photo picture image video scene of and with without in on at for not object"
_DIGIT_WORDS = "digit number handwritten"

Tier = Literal["plain", "paraphrase", "rare"]


def words() -> list[str]:
    """Every word of the world, sorted: the closed vocabulary of its tokenizer."""
    tables = [*PARAPHRASES.values(), *RARE.values(), *(detail.phrases for detail in DETAILS)]
    phrases = [phrase for table in tables for phrase in table]
    phrases += [*SHAPES, *COLORS, *DEFECTS, *MOTIONS, *PERFECT, *DAMAGED, *STYLES, *DIGITS, _FILLERS, _DIGIT_WORDS]
    return sorted({word for phrase in phrases for word in phrase.split()})


def phrase(name: str, value: int, *, tier: Tier = "plain") -> str:
    """How a detail's value is put in words of a tier."""
    if tier == "plain":
        return next(detail.phrases[value] for detail in DETAILS if detail.name == name)
    return (PARAPHRASES if tier == "paraphrase" else RARE)[name][value]


def records(scene: Scene) -> list[dict[str, int]]:
    """Scenes as plain dictionaries, one per scene."""
    columns = {name: values.tolist() for name, values in vars(scene).items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def statement(record: dict[str, int], detail: str) -> str:
    """The sentence of a minimal pair: class and one detail."""
    return f"a {COLORS[record['color']]} {SHAPES[record['shape']]} {phrase(detail, record[detail])}"


def _subject(record: dict[str, int], rng: random.Random, *, no_color: float, no_shape: float = 0.0) -> str:
    shape = "object" if rng.random() < no_shape else SHAPES[record["shape"]]
    name = shape if rng.random() < no_color else f"{COLORS[record['color']]} {shape}"
    return rng.choice(TEMPLATES).format(name)


def short_captions(
    scene: Scene, rng: random.Random, *, detail_share: float = 0.4, most: int = 1, no_color: float = 0.3
) -> list[str]:
    """What people write: the class, now and then 1..`most` details (in a share of `detail_share` of the captions)."""
    names = [detail.name for detail in DETAILS]
    result = []
    for record in records(scene):
        count = rng.randint(1, most) if rng.random() < detail_share else 0
        told = [phrase(name, record[name]) for name in rng.sample(names, count)]
        result.append(" ".join([_subject(record, rng, no_color=no_color), *told]))
    return result


def detailed_captions(
    scene: Scene,
    rng: random.Random,
    *,
    counts: Sequence[int],
    no_color: float = 0.1,
    no_shape: float = 0.0,
    paraphrased: float = 0.3,
) -> list[str]:
    """The class and as many details as drawn from `counts`, in any order, each paraphrased with that probability."""
    names = [detail.name for detail in DETAILS]
    result = []
    for record in records(scene):
        told = [
            phrase(name, record[name], tier="paraphrase" if rng.random() < paraphrased else "plain")
            for name in rng.sample(names, rng.choice(counts))
        ]
        result.append(" ".join([_subject(record, rng, no_color=no_color, no_shape=no_shape), *told]))
    return result


def long_captions(scene: Scene, rng: random.Random) -> list[str]:
    """Everything, in shuffled order, a third of it paraphrased."""
    return detailed_captions(scene, rng, counts=(len(DETAILS),), no_color=0.0)


def story_captions(scene: Scene, rng: random.Random) -> list[str]:
    """A short caption, then a sentence for each detail in shuffled order: most of it lies behind the 32nd token."""
    result = []
    for record, opening in zip(records(scene), short_captions(scene, rng, detail_share=0.0, no_color=0.0), strict=True):
        names = rng.sample([detail.name for detail in DETAILS], len(DETAILS))
        told = [rng.choice(SENTENCES).format(phrase(name, record[name])) for name in names]
        result.append(". ".join([opening, *told]) + ".")
    return result


def reworded_captions(scene: Scene, rng: random.Random, *, negated: float = 0.3) -> list[str]:
    """Everything in rare words; a two-valued detail is put as the negation of its opposite now and then."""
    result = []
    for record in records(scene):
        told = []
        for detail in rng.sample(DETAILS, len(DETAILS)):
            value = record[detail.name]
            if len(detail.phrases) == 2 and rng.random() < negated:
                told.append(f"not {phrase(detail.name, 1 - value, tier='rare')}")
            else:
                told.append(phrase(detail.name, value, tier="rare"))
        subject = f"{RARE['color'][record['color']]} {RARE['shape'][record['shape']]}"
        result.append(" ".join([rng.choice(TEMPLATES).format(subject), *told]))
    return result
