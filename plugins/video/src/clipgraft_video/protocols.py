"""Few-shot and base-to-novel protocols: which videos may be trained on, and the rule against leaks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from clipgraft.errors import InputError


def few_shot(labels: Sequence[int], shots: int, *, seed: int) -> list[int]:
    """``shots`` places of every class, drawn by ``seed``, in the list's order; a class that has fewer is an error."""
    rng, chosen = torch.Generator().manual_seed(seed), list[int]()
    for label in sorted(set(labels)):
        places = [k for k, value in enumerate(labels) if value == label]
        if len(places) < shots:
            raise InputError(f"class {label} has {len(places)} videos, fewer than the {shots} shots asked for")
        order = torch.randperm(len(places), generator=rng)[:shots].tolist()
        chosen += [places[k] for k in order]
    return sorted(chosen)


@dataclass(frozen=True, slots=True)
class Halves:
    """Class positions of the base and the novel half, each in its own order from 0."""

    base: tuple[int, ...]
    novel: tuple[int, ...]

    def of(self, name: str) -> tuple[int, ...]:
        """The half called ``base`` or ``novel``."""
        if name not in ("base", "novel"):
            raise InputError(f"there is no half {name!r}; write base or novel")
        return self.base if name == "base" else self.novel


def halves(classes: int) -> Halves:
    """The first half of the classes, rounded up, is base: 51 classes become 26 and 25."""
    middle = -(-classes // 2)
    return Halves(tuple(range(middle)), tuple(range(middle, classes)))


def within(places: Mapping[int, int], labels: Sequence[int]) -> tuple[list[int], list[int]]:
    """Indices of the videos whose class is in ``places`` {old label: new label}, and their new labels."""
    kept = [k for k, label in enumerate(labels) if label in places]
    return kept, [places[labels[k]] for k in kept]


def harmonic_mean(base: float, novel: float) -> float:
    """2 b n / (b + n) of two accuracies; 0 when both are."""
    return 2 * base * novel / (base + novel) if base + novel else 0.0


def refuse_leak(train: Sequence[str], test: Sequence[str]) -> None:
    """``InputError`` when a video is trained on and tested on.

    Few-shot lists drawn from one split's training part lie in other splits' test parts (HMDB51: 233 of 816 videos of
    the 16-shot list of split 1 are in the test list of split 2), so such a model may be tested on its own split only.
    """
    if both := set(train) & set(test):
        raise InputError(
            f"{len(both)} of {len(set(test))} test videos were trained on, such as {min(both)}; test on the split that "
            "the training list belongs to"
        )
