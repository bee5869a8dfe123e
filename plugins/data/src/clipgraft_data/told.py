"""What a row of a table or a JSON member tells about an image: captions with weights, negatives, class, group."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clipgraft.data.images import checked_weights
from clipgraft.errors import InputError


@dataclass(frozen=True, slots=True)
class Told:
    """``captions`` with an empty one where the field is empty, as tables of the core have it."""

    captions: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    negatives: tuple[str, ...] = ()
    label: str | None = None
    group: str = ""


def caption_keys(text: str, *, where: str) -> dict[str, float]:
    """``"raw:0.3,synthetic:0.7"`` -> {"raw": .3, "synthetic": .7}; a name alone weighs 1."""
    keys = dict[str, float]()
    for part in text.split(","):
        name, colon, weight = part.strip().partition(":")
        try:
            keys[name] = float(weight) if colon else 1.0
        except ValueError:
            keys[name] = -1.0
        if not name or not 0 <= keys[name] < math.inf:
            raise InputError(f"{where}: {part.strip()!r} names no captions; write FIELD or FIELD:WEIGHT, as raw:0.3")
    if not sum(keys.values()):
        raise InputError(f"{where}: all caption weights are zero; give one that is not")
    return keys


def told(row: Mapping[str, Any], keys: Mapping[str, float], *, label: str = "label") -> Told:
    """One row. ``ValueError`` with one short line for what can't be used.

    With one key, ``caption_weights`` holds a weight per caption. With several, an empty field gives its share to the
    others, and captions of one field share its weight.
    """
    fields = {key: texts(row.get(key), key) for key in keys}
    if len(keys) > 1:
        fields = {key: found for key, found in fields.items() if any(found)} or {next(iter(keys)): ("",)}
    elif keys and not all(fields.values()):
        fields = dict.fromkeys(keys, ("",))
    captions = tuple(caption for found in fields.values() for caption in found)
    if len(keys) == 1:
        weights = row.get("caption_weights")
        if weights is not None and not isinstance(weights, list | tuple):
            raise ValueError(f"caption_weights is a {type(weights).__name__}; expected a list of numbers")
        if bad := [w for w in weights or () if not isinstance(w, int | float)]:
            raise ValueError(f"caption_weights holds {bad[0]!r}; expected numbers")
        shares = checked_weights(captions, weights or ())
    else:
        shares = tuple(keys[key] / len(found) for key, found in fields.items() for _ in found)
        shares = shares if sum(shares) > 0 else ()
    negatives = tuple(text for text in texts(row.get("negatives"), "negatives") if text)
    return Told(captions, shares, negatives, class_name(row.get(label)), class_name(row.get("group")) or "")


def texts(value: Any, field: str) -> tuple[str, ...]:
    """A text or a list of texts, stripped; null and NaN are the empty text."""
    values = value if isinstance(value, list | tuple) else (value,)
    found = ["" if _null(text) else text for text in values]
    if bad := [text for text in found if not isinstance(text, str)]:
        raise ValueError(f"{field} holds a {type(bad[0]).__name__}; expected text")
    return tuple(text.strip() for text in found)


def class_name(value: Any) -> str | None:
    """A label as text: 3 and 3.0 are "3"; None for null, NaN and the empty text."""
    if _null(value):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int | float):
        raise ValueError(f"a label is a {type(value).__name__}; expected text or a number")
    return str(value).strip() or None


def _null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
