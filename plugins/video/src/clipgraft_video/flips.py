"""Whether a class keeps its meaning when a video is mirrored."""

from __future__ import annotations

import re
from collections.abc import Iterable

SIDES = re.compile(r"(?<![a-z])(left|right)(?![a-z])")


def may_flip(classes: Iterable[str]) -> bool:
    """False as soon as one class says left or right, as six of Something-Something V2's do."""
    return not any(SIDES.search(_spaced(name)) for name in classes)


def _spaced(name: str) -> str:
    """TurnLeft and turn_left as turn left."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).replace("_", " ").lower()
