"""From decoded frames (T, 3, H, W') to clips (T, 3, S, S): what a test sees, and what training draws, once per clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

CROP_SCALES = (1.0, 0.875, 0.75, 0.66)
"""Side of a training crop as a share of the shorter side (TSN; ViFi-CLIP and X-CLIP use the same)."""
RESIZED = 256 / 224
"""Shorter side before a centre crop of 1."""


@dataclass(frozen=True, slots=True)
class Augment:
    """What training draws. ``jitter``: probability of colour jitter, ``gray`` of a clip without colour, ``flip``.

    ``jitter_per_frame``: other colours in every frame, as in ViFi-CLIP's and X-CLIP's code; else once per clip.
    """

    jitter: float = 0.8
    gray: float = 0.2
    flip: float = 0.5
    jitter_per_frame: bool = False


def resize_short(frames: Tensor, side: int, *, antialias: bool = True) -> Tensor:
    """(T, 3, H, W') uint8 -> the same with a shorter side of ``side`` pixels, bilinear."""
    h, w = frames.shape[-2:]
    new = (side, round(w * side / h)) if h <= w else (round(h * side / w), side)
    return frames if (h, w) == new else F.resize(frames, list(new), InterpolationMode.BILINEAR, antialias=antialias)


def test_clip(frames: Tensor, size: int, *, crops: Literal[1, 3] = 1, crop: int = 0, antialias: bool = True) -> Tensor:
    """(T, 3, H, W') uint8 -> (T, 3, S, S) uint8.

    One crop: shorter side 256/224 of S, centre. Three: shorter side S, then the left (or top), right (bottom) and
    middle square, in this order.
    """
    if crops == 1:
        return F.center_crop(resize_short(frames, round(size * RESIZED), antialias=antialias), [size, size])
    frames = resize_short(frames, size, antialias=antialias)
    h, w = frames.shape[-2:]
    share = (0.0, 1.0, 0.5)[crop]
    return F.crop(frames, int((h - size) * share), int((w - size) * share), size, size)


@dataclass(frozen=True, slots=True)
class Cut:
    """``frames`` (T, 3, S, S) uint8 as training sees them; ``mirrored``: left is right."""

    frames: Tensor
    mirrored: bool


def training_clip(frames: Tensor, size: int, *, augment: Augment, rng: Generator, antialias: bool = True) -> Cut:
    """(T, 3, H, W') uint8 -> (T, 3, S, S) uint8: one crop, one flip and one jitter for the whole clip.

    The crop's sides are two of ``CROP_SCALES`` at most one step apart, at a corner or the centre; it is stretched to
    the square. Deviation: jitter is drawn once per clip unless ``augment.jitter_per_frame``.
    """
    frames = resize_short(frames, round(size * RESIZED), antialias=antialias)
    top, left, h, w = _multi_scale(frames.shape[-2], frames.shape[-1], rng)
    frames = F.resized_crop(frames, top, left, h, w, [size, size], InterpolationMode.BILINEAR, antialias=antialias)
    mirrored = _chance(augment.flip, rng)
    if mirrored:
        frames = F.hflip(frames)
    if _chance(augment.jitter, rng):
        if augment.jitter_per_frame:
            frames = torch.cat([_jittered(frame[None], rng) for frame in frames])
        else:
            frames = _jittered(frames, rng)
    if _chance(augment.gray, rng):
        frames = F.rgb_to_grayscale(frames, num_output_channels=3)
    return Cut(frames, mirrored)


def _multi_scale(height: int, width: int, rng: Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a crop."""
    short = min(height, width)
    sides = [int(short * scale) for scale in CROP_SCALES]
    allowed = [(h, w) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1]
    h, w = allowed[_pick(len(allowed), rng)]
    down, right = height - h, width - w
    places = ((0, 0), (0, right), (down, 0), (down, right), (down // 2, right // 2))
    top, left = places[_pick(len(places), rng)]
    return top, left, h, w


def _jittered(frames: Tensor, rng: Generator) -> Tensor:
    """Brightness .4, contrast .4, saturation .2 and hue .1, in that order (torchvision's ``ColorJitter`` shuffles)."""
    brightness, contrast, saturation, hue = (torch.rand(4, generator=rng) * 2 - 1).tolist()
    frames = F.adjust_brightness(frames, 1 + 0.4 * brightness)
    frames = F.adjust_contrast(frames, 1 + 0.4 * contrast)
    frames = F.adjust_saturation(frames, 1 + 0.2 * saturation)
    return F.adjust_hue(frames, 0.1 * hue)


def _chance(p: float, rng: Generator) -> bool:
    return bool(torch.rand((), generator=rng) < p)


def _pick(n: int, rng: Generator) -> int:
    return int(torch.randint(n, (), generator=rng))
