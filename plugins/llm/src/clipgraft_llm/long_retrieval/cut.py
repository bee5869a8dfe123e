"""How much of a text a tokenizer cuts off: counted, because open_clip's tokenizers cut silently."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass, replace

from torch import Tensor

from clipgraft.encoders.base import Tokenizer
from clipgraft.errors import InputError

MOST = 2**15
"""Tokens of the longest text that is counted."""
BLOCK = 512
"""Texts tokenised at a time."""


@dataclass(frozen=True, slots=True)
class Cut:
    """``length`` tokens of a text with start and end, ``lost`` of them behind the context."""

    length: int
    lost: int


def cut_tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Cut]:
    """One ``Cut`` per text, by a copy of ``tokenizer`` whose context grows until nothing is cut."""
    if not is_dataclass(tokenizer) or isinstance(tokenizer, type):
        raise InputError(f"the tokens of a {type(tokenizer).__name__} can't be counted; its context can't be changed")
    found = list[Cut]()
    for start in range(0, len(texts), BLOCK):
        block, context = list(texts[start : start + BLOCK]), tokenizer.context_length
        kept = lengths = _used(tokenizer(block), tokenizer.pad_id)
        while int(lengths.max()) >= context - 1 and context < MOST:
            context *= 4
            longer: Tokenizer = replace(tokenizer, context_length=context)  # type: ignore[type-var, assignment]
            lengths = _used(longer(block), tokenizer.pad_id)
        found += [Cut(int(n), int(n - k)) for n, k in zip(lengths, kept, strict=True)]
    return found


def _used(ids: Tensor, pad: int) -> Tensor:
    """(B, L) ids -> (B,) columns up to the last that is no padding (a tokenizer that pads with its end: without it)."""
    used = ids != pad
    return ids.shape[1] - used.flip(1).int().argmax(1)
