"""Negations that are written out: a caption in a template, put together as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError

PAIRS = (
    ("a photo of {}", "a photo of no {}"),
    ("a picture with {}", "a picture without {}"),
    ("an image showing {}", "an image not showing {}"),
    ("a scene that contains {}", "a scene that does not contain {}"),
    ("there is {} here", "there is no {} here"),
    ("this is {}", "this is not {}"),
)
"""Assertions and their negations. Ours: the paper's are 128 and 128 of the same kind."""


def check_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    """Raise ``ValueError`` for a template that can't be put around token ids."""
    for template in (t for pair in pairs for t in pair):
        before, found, after = template.partition("{}")
        if not found or "{}" in after:
            raise ValueError(f"template {template!r} must hold {{}} once, where the caption goes")
        if (before and not before.endswith(" ")) or (after and not after.startswith(" ")):
            raise ValueError(f"template {template!r} needs a space on either side of {{}}")


def ends(text: Any, ids: Tensor) -> Tensor:
    """(B,) positions of the end token in ids (B, L), as the text tower finds it."""
    tower = text.tower
    return ids.argmax(-1) if tower.pool_type == "argmax" else (ids == tower.eos_id).int().argmax(-1)


class Filled:
    """Captions, as token ids, put into templates; a caption that gets too long loses its last tokens."""

    def __init__(self, encoder: Encoder, templates: Sequence[str]) -> None:
        self.text = encoder.text
        halves = [part.strip() for template in templates for part in template.split("{}")]
        ids = encoder.tokenizer(halves)
        words = [row[1:end] for row, end in zip(ids, ends(self.text, ids).tolist(), strict=True)]
        self.around = list(zip(words[::2], words[1::2], strict=True))
        longest = max(len(before) + len(after) for before, after in self.around)
        if longest + 3 > ids.shape[1]:
            raise InputError(f"a template takes {longest} of the {ids.shape[1]} tokens of this text tower; shorten it")

    def __call__(self, ids: Tensor, choice: Sequence[int]) -> Tensor:
        """Captions (B, L) in the templates number ``choice`` (B of them) -> (B, L)."""
        rows = []
        for row, end, number in zip(ids, ends(self.text, ids).tolist(), choice, strict=True):
            before, after = (part.to(row.device) for part in self.around[number])
            room = len(row) - 2 - len(before) - len(after)
            words = torch.cat([row[:1], before, row[1:end][:room], after, row[end : end + 1]])
            rows.append(torch.cat([words, row.new_full((len(row) - len(words),), self._pad(row, end))]))
        return torch.stack(rows)

    def _pad(self, row: Tensor, end: int) -> int:
        """What stands behind this caption's end, 0 where nothing does."""
        return int(row[end + 1]) if end + 1 < len(row) else 0
