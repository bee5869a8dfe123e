"""Names in files -> canonical names, for open_clip's two layouts and Hugging Face's, without reading a tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from clipgraft.encoders import huggingface
from clipgraft.encoders.openclip import custom_layout
from clipgraft.errors import InputError

Layout = Literal["open_clip", "huggingface", "own"]
OWN_PREFIXES = {"image.tower.": "visual.", "text.tower.": "text."}
"""An encoder's own names of its towers, as exports hold them that open_clip can't open."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a canonical tensor is: the names it is made of, along axis 0, and what happens to them."""

    names: tuple[str, ...]
    parts: int = 1
    part: int = 0
    how: str = ""
    scalar: bool = False

    @property
    def flat(self) -> bool:
        """Whether its numbers are those of ``names``, one after the other."""
        return self.parts == 1 and self.how in ("", "batched")

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """The tensors of ``names`` -> the canonical one; on the meta device it tells the shape."""
        if self.parts == 1 and len(tensors) == 1 and not self.how:
            found = tensors[0]
        else:
            found = huggingface._carry(list(tensors), parts=self.parts, how=self.how)[self.part]
        return found.reshape(()) if self.scalar and found.numel() == 1 else found


def layout_of(names: Iterable[str]) -> Layout:
    """Whose names these are; ``own`` when neither open_clip's nor Hugging Face's."""
    plain = {name.removeprefix("module.").partition(".")[0] for name in names}
    if {"vision_model", "text_model"} <= plain:
        return "huggingface"
    return "open_clip" if "visual" in plain else "own"


def places(names: Iterable[str], *, layout: Layout, where: str) -> dict[str, Place]:
    """{canonical name: place}. Position ids that transformers once stored are left out, as the readers do."""
    names = list(names)
    if layout == "own":
        return {_from_own(name): Place((name,), scalar=name.startswith("logit_")) for name in names}
    names = [name for name in names if not name.endswith("position_ids")]
    if layout == "huggingface":
        return _huggingface(set(names), where=where)
    found = {}
    for name in names:
        key = next(iter(custom_layout({name: None})))  # type: ignore[dict-item]
        if key in found:
            raise InputError(f"{where} holds {found[key].names[0]} and {name}, which are the same tensor; remove one")
        found[key] = Place((name,), scalar=key.startswith("logit_"))
    return found


def _from_own(name: str) -> str:
    prefix = next((p for p in OWN_PREFIXES if name.startswith(p)), "")
    return OWN_PREFIXES.get(prefix, "") + name.removeprefix(prefix)


def to_own(key: str) -> str:
    """A canonical name -> an encoder's own."""
    for own, prefix in OWN_PREFIXES.items():
        if key.startswith(prefix):
            return own + key.removeprefix(prefix)
    return key


def _huggingface(names: set[str], *, where: str) -> dict[str, Place]:
    kind = "siglip" if "vision_model.head.probe" in names else "clip"
    vision, text = (_depth(names, tower) for tower in ("vision_model", "text_model"))
    found = {
        key: Place(move.theirs, len(move.ours), part, move.how, scalar=key.startswith("logit_"))
        for move in huggingface._moves(kind, vision, text)
        for part, key in enumerate(move.ours)
    }
    if odd := sorted({n for place in found.values() for n in place.names} ^ names):
        what = "has no place in" if odd[0] in names else "is missing for"
        raise InputError(f"{where}: the tensor {odd[0]} {what} a plain CLIP or SigLIP ({len(odd)} such)")
    return found


def _depth(names: set[str], tower: str) -> int:
    pattern = re.compile(rf"{tower}\.encoder\.layers\.(\d+)\.")
    return 1 + max((int(m[1]) for name in names if (m := pattern.match(name))), default=-1)
