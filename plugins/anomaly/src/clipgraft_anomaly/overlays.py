"""Heat maps on pictures and outlines of masks, with numpy alone. H x W' pixels.

The colours are our own: a path through Oklab (Ottosson 2020) from dark violet over red to light yellow, walked at
constant speed, so that equal steps of the score look equally large; lightness rises all the way.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

PATH = (  # lightness, chroma, hue [degrees] of Oklab; all of it lies inside sRGB
    (0.24, 0.105, 292),
    (0.40, 0.150, 322),
    (0.54, 0.175, 360),
    (0.66, 0.165, 396),
    (0.78, 0.145, 430),
    (0.93, 0.130, 467),
)
LEVELS = 256
STRIP = 256
"""Rows at a time, so that large pictures need little more memory than themselves."""
STRENGTH = 0.7
"""How much of the picture the largest score covers."""
OUTLINE = (0, 229, 255)
"""A colour that the heat map doesn't have."""
CASING = (16, 24, 32)
_LMS = np.array([[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]])
_RGB = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)


@cache
def colour_table() -> Bytes:
    """(256, 3) sRGB."""
    return (srgb(oklab_path()).clip(0, 1) * 255).round().astype(np.uint8)


def oklab_path(levels: int = LEVELS) -> NDArray[np.float64]:
    """(levels, 3): points equally far apart on a smooth curve through ``PATH``."""
    lightness, chroma, hue = np.array(PATH, float).T
    knots = np.stack([lightness, chroma * np.cos(np.radians(hue)), chroma * np.sin(np.radians(hue))], 1)
    at = np.linspace(0, len(knots) - 1, 20 * levels)
    fine = _catmull_rom(knots, at)
    way = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(fine, axis=0), axis=1))])
    even = np.linspace(0, way[-1], levels)
    return np.stack([np.interp(even, way, axis) for axis in fine.T], 1)


def srgb(oklab: NDArray[np.float64]) -> NDArray[np.float64]:
    """Oklab (n, 3) -> gamma-encoded sRGB (n, 3); outside of [0, 1] where the screen can't show it."""
    linear = (oklab @ _LMS.T) ** 3 @ _RGB.T
    small, large = 12.92 * linear, 1.055 * np.abs(linear) ** (1 / 2.4) - 0.055
    found: NDArray[np.float64] = np.where(linear <= 0.0031308, small, large)
    return found


def heat(scores: Floats, scale: tuple[float, float]) -> Floats:
    """Scores (H, W') on [low, high] -> [0, 1], what lies outside at the ends."""
    low, high = scale
    return ((scores - low) / max(high - low, 1e-12)).clip(0, 1).astype(np.float32)


def overlay(picture: Bytes, scores: Floats, scale: tuple[float, float], *, strength: float = STRENGTH) -> Bytes:
    """A picture (H, W', 3) below the colours of its scores (H, W'): the higher the score, the less shows through.

    ``scale`` is one for all pictures of a data set, so that a good part looks like one.
    """
    table, drawn = colour_table(), np.empty_like(picture)
    for start in range(0, len(picture), STRIP):
        rows = slice(start, start + STRIP)
        share = heat(scores[rows], scale)
        colour = table[(share * (LEVELS - 1)).round().astype(np.uint8)]
        cover = (strength * share)[..., None]
        drawn[rows] = (picture[rows] * (1 - cover) + colour * cover).round().astype(np.uint8)
    return drawn


def outline(mask: NDArray[np.bool_], *, width: int = 1) -> NDArray[np.bool_]:
    """(H, W'): pixels of the mask at most ``width`` steps (of four directions) from outside of it or the edge."""
    inner = mask
    for _ in range(width):
        wide = np.pad(inner, 1)
        inner = inner & wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]
    return mask & ~inner


def outlined(picture: Bytes, mask: NDArray[np.bool_], *, width: int | None = None) -> Bytes:
    """The picture (H, W', 3) with the mask's outline in ``OUTLINE`` and a dark line around it.

    ``width`` [pixels] is by default as much as suits the picture's size.
    """
    width = max(1, round(min(mask.shape) / 250)) if width is None else width
    drawn = picture.copy()
    drawn[_around(mask, width=max(1, width // 2))] = CASING
    drawn[outline(mask, width=width)] = OUTLINE
    return drawn


def _around(mask: NDArray[np.bool_], *, width: int) -> NDArray[np.bool_]:
    """(H, W'): pixels outside of the mask, at most ``width`` steps from it."""
    outer = mask
    for _ in range(width):
        wide = np.pad(outer, 1)
        outer = outer | wide[:-2, 1:-1] | wide[2:, 1:-1] | wide[1:-1, :-2] | wide[1:-1, 2:]
    return outer & ~mask


def _catmull_rom(knots: NDArray[np.float64], at: NDArray[np.float64]) -> NDArray[np.float64]:
    """The curve through knots (k, 3) at places (n,) in [0, k - 1]; ends are continued straight."""
    wide = np.concatenate([2 * knots[:1] - knots[1:2], knots, 2 * knots[-1:] - knots[-2:-1]])
    start = np.minimum(at.astype(np.int64), len(knots) - 2)
    t = (at - start)[:, None]
    a, b, c, d = (wide[start + k] for k in range(4))
    curved: NDArray[np.float64] = 0.5 * (
        2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3
    )
    return curved
