"""What the stages of this plugin know beyond image and text, and the weighted sum of the losses that a config names.

Shapes: B rows of this rank, K negatives per caption, D joint space, S the teachers' widths together.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from clipgraft.errors import ClipgraftError
from clipgraft.losses.base import Loss, LossInputs
from clipgraft.types import widened


@dataclass(frozen=True, slots=True, kw_only=True)
class TextInputs(LossInputs):
    """``negatives`` (B, K, D) embeddings of wrong captions, ``present`` (B, K) bool: which of them exist;

    ``reference`` (B, D) random, shared by image and text; ``synthetic`` (B, D) embeddings of written captions;
    ``teacher_synthetic`` (B, S) what teachers make of them. With several teachers ``teacher_image`` and
    ``teacher_text`` are (B, S) too, the teachers side by side, each part of length one.
    """

    negatives: Tensor | None = None
    present: Tensor | None = None
    reference: Tensor | None = None
    synthetic: Tensor | None = None
    teacher_synthetic: Tensor | None = None


HINTS = {
    "negatives": "a recipe that reads wrong captions, llm/negclip or llm/count-to-ten",
    "present": "a recipe that reads wrong captions, llm/negclip or llm/count-to-ten",
    "reference": "the recipe llm/clip-refine",
    "synthetic": "the recipe llm/reinforce",
    "teacher_synthetic": "the recipe llm/reinforce",
}


def needed(inputs: LossInputs, name: str) -> Tensor:
    """A field of ``TextInputs``: floats as fp32, a teacher's without its graph; the recipe that gives it otherwise."""
    value: Tensor | None = getattr(inputs, name, None)
    if value is None:
        raise ClipgraftError(f"the loss needs {name}, which this stage doesn't compute; use {HINTS[name]}")
    return widened(value.detach() if name.startswith("teacher") else value)


def weighted(losses: Iterable[Loss], weights: Iterable[float], inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the losses' "loss" and every term by "Class.index.name"."""
    terms: dict[str, Tensor] = {}
    total = []
    for index, (loss, weight) in enumerate(zip(losses, weights, strict=True)):
        found = loss(inputs)
        total.append(weight * found["loss"])
        terms |= {f"{type(loss).__name__}.{index}.{k}": v for k, v in found.items()}
    return sum(total[1:], start=total[0]), terms
