"""Label maps as colours on pictures, side by side, with names and a legend."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

Bytes = NDArray[np.uint8]
STRENGTH = 0.6
"""How much of the picture a label's colour covers."""
CELL, LINE, GAP = 160, 22, 6
"""Smallest side of a picture on a sheet, height of a line of text, space between [pixels]."""
PAPER, INK = (255, 255, 255), (20, 20, 20)
IGNORED = (128, 128, 128)
LUMINANCE = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True, slots=True)
class Panel:
    """One cell of a sheet: its title and its pixels (H, W', 3)."""

    title: str
    pixels: Bytes


def colours(count: int) -> list[tuple[int, int, int]]:
    """Colours of labels 1 to ``count``: hues a golden section apart, two lightnesses, so that neighbours differ."""
    found = []
    for k in range(count):
        hue = (0.58 + k * 0.61803398875) % 1
        red, green, blue = colorsys.hsv_to_rgb(hue, 0.85 if k % 2 == 0 else 0.65, 0.95 if k % 2 == 0 else 0.75)
        found.append((round(red * 255), round(green * 255), round(blue * 255)))
    return found


def overlay(picture: Bytes, labels: NDArray[np.int64], palette: Sequence[tuple[int, int, int]]) -> Bytes:
    """A picture (H, W', 3) below the colours of its labels (H, W'); background shows through, 255 is hatched grey.

    Below a colour the picture is grey, so that its own colours don't mix with those of the legend, and a border between
    labels is dark.
    """
    table = np.array([(0, 0, 0), *palette], np.float64)
    known = np.where(labels == 255, 0, labels)
    covered = (labels > 0)[..., None] * STRENGTH
    rows, columns = np.indices(labels.shape)
    hatch = (labels == 255) & ((rows + columns) // max(2, labels.shape[0] // 64) % 2 == 0)
    colour = np.where(hatch[..., None], np.array(IGNORED, np.float64), table[known])
    covered = np.where((labels == 255)[..., None], hatch[..., None] * STRENGTH, covered)
    grey = (picture @ LUMINANCE)[..., None]
    below = np.where(covered > 0, grey, picture)
    drawn: Bytes = (below * (1 - covered) + colour * covered).round().astype(np.uint8)
    drawn[_borders(labels)] = INK
    return drawn


def _borders(labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(H, W'): pixels of a label whose right or lower neighbour has another one."""
    border = np.zeros(labels.shape, bool)
    border[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    border[:-1] |= labels[:-1] != labels[1:]
    return border


def sheet(rows: Sequence[Sequence[Panel]], legend: Mapping[str, tuple[int, int, int]], *, width: int = 1600) -> Image:
    """Rows of panels with their titles above, and the legend below; small pictures are enlarged without smoothing."""
    from PIL import Image as pillow
    from PIL import ImageDraw, ImageFont

    font = ImageFont.load_default(14)
    pictures = [[_enlarged(panel.pixels) for panel in row] for row in rows]
    across = max(sum(p.width + GAP for p in row) for row in pictures) + GAP
    tall = [max(p.height for p in row) + LINE + GAP for row in pictures]
    across = max(across, min(width, 320))
    lines = _legend_lines(list(legend), font, across)
    page = pillow.new("RGB", (across, sum(tall) + GAP + LINE * len(lines) + GAP), PAPER)
    draw, y = ImageDraw.Draw(page), GAP
    for panels, found, height in zip(rows, pictures, tall, strict=True):
        x = GAP
        for panel, picture in zip(panels, found, strict=True):
            draw.text((x, y), _fitted(panel.title, font, picture.width), fill=INK, font=font)
            page.paste(picture, (x, y + LINE))
            x += picture.width + GAP
        y += height
    for line in lines:
        x = GAP
        for name in line:
            draw.rectangle((x, y + 4, x + 14, y + 18), fill=legend[name], outline=INK)
            draw.text((x + 20, y + 2), name, fill=INK, font=font)
            x += 20 + round(font.getlength(name)) + 3 * GAP
        y += LINE
    return page


def _enlarged(pixels: Bytes) -> Image:
    from PIL import Image as pillow

    picture = pillow.fromarray(pixels)
    times = max(1, -(-CELL // min(picture.size)))
    return picture.resize((picture.width * times, picture.height * times), pillow.Resampling.NEAREST)


def _fitted(text: str, font: object, width: int) -> str:
    """The text, shortened from the front until it fits: ends tell models apart."""
    length = font.getlength  # type: ignore[attr-defined]
    if length(text) <= width:
        return text
    while len(text) > 1 and length("…" + text) > width:
        text = text[1:]
    return "…" + text


def _legend_lines(names: Sequence[str], font: object, width: int) -> list[list[str]]:
    lines: list[list[str]] = [[]]
    used = GAP
    for name in names:
        need = 20 + round(font.getlength(name)) + 3 * GAP  # type: ignore[attr-defined]
        if lines[-1] and used + need > width:
            lines.append([])
            used = GAP
        lines[-1].append(name)
        used += need
    return lines
