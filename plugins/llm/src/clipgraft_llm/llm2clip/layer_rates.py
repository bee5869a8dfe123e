"""Learning rates that fall from the image tower's head to its pixels."""

from __future__ import annotations

import re
from typing import Literal

from clipgraft.errors import InputError

_BLOCK = re.compile(r"\.(?:resblocks|blocks)\.(\d+)\.")
_STAGE = re.compile(r"\.layer(\d)\.")
_STEM = re.compile(
    r"\b(conv1|conv2|conv3|bn1|bn2|bn3|patch_embed|positional_embedding|pos_embed|class_embedding|cls_token|ln_pre|norm_pre)\b"
)
_OFFICIAL_MISSES = re.compile(r"\b(class_embedding|ln_pre)\b")


def layer_of(name: str, depth: int, *, compat: Literal["none", "official"] = "none") -> int:
    """Which of 0 (pixels) .. ``depth`` (last block) .. ``depth + 1`` (what follows) a parameter of a tower belongs to.

    ``compat="official"``: the official rule knows no class token and first norm by open_clip's names, so both are
    taken for what follows the last block.
    """
    if found := _BLOCK.search(name) or _STAGE.search(name):
        index = int(found[1])
        return index + 1 if "layer" not in found[0] else index
    if compat == "official" and _OFFICIAL_MISSES.search(name):
        return depth + 1
    return 0 if _STEM.search(name) else depth + 1


def layer_rate(name: str, depth: int, *, decay: float, compat: Literal["none", "official"] = "none") -> float:
    """decay ** (depth + 1 - layer): 1 behind the last block, ``decay`` in it."""
    layer = layer_of(name, depth, compat=compat)
    if layer > depth + 1:
        raise InputError(f"visual_decay: {name} lies beyond the {depth} blocks of this image tower; set it to 1")
    return float(decay ** (depth + 1 - layer))
