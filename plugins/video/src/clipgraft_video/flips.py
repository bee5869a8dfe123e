"""What a class becomes when a video is mirrored."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from clipgraft.errors import InputError

SIDES = re.compile(r"(?<![a-z])(left|right)(?![a-z])")


def may_flip(classes: Iterable[str]) -> bool:
    """False as soon as one class says left or right, as six of Something-Something V2's do."""
    return not any(SIDES.search(_spaced(name)) for name in classes)


def mirrored_places(classes: Sequence[str]) -> list[int]:
    """The place of every class's mirror image: left and right exchanged in its name; its own when it says neither.

    ``InputError`` when a mirror image is no class, since such videos would get a wrong label.
    """
    places = {_spaced(name): k for k, name in enumerate(classes)}
    images = [SIDES.sub(lambda m: "right" if m[0] == "left" else "left", _spaced(name)) for name in classes]
    odd = next((k for k, image in enumerate(images) if image not in places), None)
    if odd is not None:
        raise InputError(
            f"flip=swap: the class {classes[odd]!r} has no mirror image {images[odd]!r} here; leave flip out"
        )
    return [places[image] for image in images]


def _spaced(name: str) -> str:
    """TurnLeft and turn_left as turn left."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).replace("_", " ").lower()
