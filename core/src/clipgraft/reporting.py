"""What a plugin writes on the page of a run: sections of text, pictures and tables, as plain records.

A ``clipgraft_reports`` target ``(run, *, registry) -> Sequence[Section]`` returns them; the page lays them out, in
light and dark, on a phone and for a screen reader. Importing this costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from clipgraft.errors import ClipgraftError

if TYPE_CHECKING:
    from clipgraft.data.base import Picture as Pixels

SMALL, SIDE = 96, 224
"""Up to which longest side a picture stays as it is, and what others are reduced to [pixels]."""

Tone = Literal["", "right", "wrong"]


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture: ``image`` is the text of an SVG document, or the bytes of a PNG or JPEG file.

    ``alt`` says what is to be seen to whoever doesn't see it. ``caption`` stands below; ``tone`` marks it as right or
    wrong by a sign and a colour. The page runs no script of an SVG and loads nothing for it.
    """

    image: str | bytes
    alt: str
    caption: str = ""
    tone: Tone = ""

    def __post_init__(self) -> None:
        """Refuse what a page can't show."""
        if not self.alt.strip():
            raise ClipgraftError("a picture of a report needs a text that says what is to be seen (alt)")
        if self.media == "":
            raise ClipgraftError(f"the picture {self.alt!r} is neither SVG text nor a PNG or JPEG file")

    @property
    def media(self) -> str:
        """The media type; empty for what is none of the three."""
        if isinstance(self.image, str):
            return "image/svg+xml" if "<svg" in self.image[:1000] else ""
        known = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}
        return next((media for start, media in known.items() if self.image.startswith(start)), "")


@dataclass(frozen=True, slots=True)
class Figure:
    """Pictures that belong together, side by side in order: a film strip, a query with what it found.

    ``across``: pictures in a row where the page is wide; a narrow one breaks the row. ``caption`` is of the whole.
    """

    pictures: tuple[Picture, ...]
    caption: str = ""
    across: int = 1

    def __post_init__(self) -> None:
        """Refuse an empty figure."""
        if not self.pictures or self.across < 1:
            raise ClipgraftError(f"the figure {self.caption!r} needs a picture, and one or more of them across")


@dataclass(frozen=True, slots=True)
class Table:
    """A table: the first cell of every row is its head. ``header`` names all columns, the first one too.

    ``shaded``: cells that are numbers are a heat map, from nothing at zero to full at the largest one; a screen reader
    reads the numbers. ``folded``: behind its caption until it is asked for. ``places``: digits behind the point of
    floats; whole numbers and words stay as they are.
    """

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str | float, ...], ...]
    shaded: bool = False
    folded: bool = False
    places: int = 3

    def __post_init__(self) -> None:
        """Refuse rows that aren't as long as the header."""
        if not self.caption.strip() or {len(row) for row in self.rows} - {len(self.header)}:
            raise ClipgraftError(f"the table {self.caption!r} needs a caption and {len(self.header)} cells in each row")


@dataclass(frozen=True, slots=True)
class Section:
    """One part of the page. ``text`` is plain, paragraphs separated by an empty line; tables stand below figures."""

    title: str
    text: str = ""
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()


Report = Callable[..., Sequence[Section]]
"""``(run: clipgraft.rundir.RunRecord, *, registry: Registry)``; empty for a run that it has nothing to say about."""


def encoded(pixels: Pixels, *, side: int = SIDE) -> bytes:
    """A source's picture (PIL, or uint8 (3, H, W')) for a page: PNG when it is small, else JPEG of ``side`` pixels."""
    import io

    from PIL import Image
    from torch import Tensor

    from clipgraft.data.images import as_rgb

    if isinstance(pixels, Tensor):
        image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    else:
        image = as_rgb(pixels)
    buffer = io.BytesIO()
    if max(image.size) <= SMALL:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.thumbnail((side, side))
        image.save(buffer, "JPEG", quality=86)
    return buffer.getvalue()
