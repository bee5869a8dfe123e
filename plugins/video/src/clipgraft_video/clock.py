"""How many frames belong together, told to the blocks of an image tower that mix frames.

A tower gets frames as a batch of pictures, (B T, 3, H, W'). Grafts that let frames see each other share one ``Clock``;
whoever calls the tower says how many consecutive pictures are one video. Without a word every picture is a video of one
frame, so that a grafted CLIP still takes pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from clipgraft.errors import InputError


class Clock:
    """``frames``: T of the call at work. ``left``: what blocks leave for the head, forgotten when the call ends."""

    def __init__(self) -> None:
        self.frames, self.left, self._shown = 1, dict[str, Tensor](), False

    @contextmanager
    def showing(self, frames: int) -> Iterator[None]:
        """T consecutive pictures are one video inside the block."""
        before, self.frames, self._shown = (self.frames, self._shown), frames, True
        try:
            yield
        finally:
            self.frames, self._shown = before
            self.left.clear()

    def leave(self, name: str, x: Tensor) -> None:
        """Keep ``x`` for the head of this call; a picture alone has no head and keeps nothing."""
        if self._shown:
            self.left[name] = x

    def videos(self, x: Tensor) -> Tensor:
        """(B T, ...) -> (B, T, ...)."""
        if len(x) % self.frames:
            raise InputError(f"{len(x)} pictures are no whole number of videos of {self.frames} frames")
        return x.unflatten(0, (-1, self.frames))
