"""The corruptions of ImageNet-C as image operations (Hendrycks and Dietterich 2019, arXiv 1903.12261).

Images are (H, W, 3) float64 in [0, 1]. The constants of the five severities are the published ones, for 224 pixels;
``unit`` = shorter side / 224 scales those that are lengths.

Deviation: frost is left out, because it needs photographs of frost. Lengths follow the size of the image (snow and
elastic fields are made for 224 pixels and resized), but noise per pixel and the 8 x 8 blocks of JPEG can't, and blurs
of less than a pixel do nothing. The disk of defocus is antialiased by coverage, motion is sub-pixel, zoom
is about the exact centre, and elastic resamples once. Results are rounded to 8 bits and not stored as JPEG in between.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from functools import lru_cache
from math import ceil, cos, pi, sin

import numpy as np
from numpy.random import Generator
from PIL import Image
from scipy import fft, ndimage, signal

Array = np.ndarray
Operation = Callable[[Array, int, Generator, float], Array]
"""Image, severity as 0 .. 4, randomness, ``unit`` -> image; values outside [0, 1] are clipped."""


def corrupt(picture: Array, name: str, severity: int, *, seed: str) -> Array:
    """(H, W, 3) uint8 -> (H, W, 3) uint8; the same for the same name, severity (1 .. 5) and seed."""
    digest = hashlib.sha256(f"{seed}/{name}/{severity}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:16], "big"))
    found = CORRUPTIONS[name](picture / 255, severity - 1, rng, min(picture.shape[:2]) / 224)
    return np.rint(np.clip(found, 0, 1) * 255).astype(np.uint8)


def gaussian_noise(x: Array, level: int, rng: Generator, unit: float) -> Array:
    """Normal noise of standard deviation c."""
    return x + rng.normal(scale=(0.08, 0.12, 0.18, 0.26, 0.38)[level], size=x.shape)


def shot_noise(x: Array, level: int, rng: Generator, unit: float) -> Array:
    """As if white were c photons."""
    photons = (60, 25, 12, 5, 3)[level]
    return rng.poisson(x * photons) / photons


def impulse_noise(x: Array, level: int, rng: Generator, unit: float) -> Array:
    """A share c of the values becomes 0 or 1."""
    drawn, share = rng.random(x.shape), (0.03, 0.06, 0.09, 0.17, 0.27)[level]
    return np.where(drawn < share / 2, 0.0, np.where(drawn < share, 1.0, x))


def defocus_blur(x: Array, level: int, rng: Generator, unit: float) -> Array:
    """Mean over a disk of radius c pixels."""
    radius = (3, 4, 6, 8, 10)[level] * unit
    half, fine = ceil(radius), 8
    line = (np.arange((2 * half + 1) * fine) + 0.5) / fine - half - 0.5  # eight points per pixel
    inside = (line[:, None] ** 2 + line**2 <= radius**2).astype(np.float64)
    kernel = inside.reshape(2 * half + 1, fine, 2 * half + 1, fine).sum((1, 3))
    return _filtered(x, kernel / kernel.sum(), pad="reflect") if kernel.sum() else x


def glass_blur(x: Array, level: int, rng: Generator, unit: float) -> Array:
    """Blur, pixels replaced by others at most d away, blur.

    One after the other from the last, as in the published images: the paper says swapped, they are copied.
    """
    sigma, reach, rounds = ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[level]
    (h, w), d = x.shape[:2], round(reach * unit)
    taken = list(range(h * w))
    places = (np.arange(h - d, d, -1)[:, None] * w + np.arange(w - d, d, -1)).ravel()
    for _ in range(rounds if d else 0):
        down, right = rng.integers(-d, d, (2, len(places)))
        for place, other in zip(places.tolist(), (places + down * w + right).tolist(), strict=True):
            taken[place] = taken[other]
    blurred = _gaussian(x, sigma * unit)
    return _gaussian(blurred.reshape(-1, 3)[taken].reshape(x.shape), sigma * unit)


def gaussian_blur(x: Array, level: int, rng: Generator, unit: float) -> Array:
    """Gaussian of standard deviation c pixels; one of the paper's extra corruptions."""
    return _gaussian(x, (1, 2, 3, 4, 6)[level] * unit)


def motion_blur(x: Array, level: int, rng: Generator, unit: float) -> Array:
    """Along a line within 45 degrees of the horizontal."""
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[level]
    return _moved(x, radius, sigma, rng.uniform(-pi / 4, pi / 4), unit)


def zoom_blur(x: Array, level: int, rng: Generator, unit: float) -> Array:
    """Mean of the image and of its centre enlarged 1, 1 + step, ... times."""
    step, count = ((0.01, 12), (0.01, 16), (0.02, 11), (0.02, 13), (0.03, 11))[level]
    (h, w), picture, total = x.shape[:2], _picture(x), x.copy()
    for factor in 1 + step * np.arange(count):
        dx, dy = w / 2 / factor, h / 2 / factor
        box = (w / 2 - dx, h / 2 - dy, w / 2 + dx, h / 2 + dy)
        total += np.asarray(picture.resize((w, h), Image.Resampling.BILINEAR, box=box)) / 255
    return total / (count + 1)


def snow(x: Array, level: int, rng: Generator, unit: float) -> Array:
    """Flakes of enlarged noise falling within 45 degrees of the vertical, twice, on a greyer image."""
    mean, spread, size, least, radius, sigma, keep = (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )[level]
    noise = rng.normal(mean, spread, _grid(x, unit))
    centre = (np.array(noise.shape) - 1) / 2
    flakes = ndimage.affine_transform(noise, [1 / size] * 2, centre * (1 - 1 / size), order=1, mode="nearest")
    flakes = np.clip(np.where(flakes < least, 0, flakes), 0, 1)[..., None]
    flakes = _moved(flakes, radius, sigma, rng.uniform(-3 * pi / 4, -pi / 4), 1)
    flakes = _fitted(flakes[..., 0], x)[..., None]
    grey = x @ np.array([[0.299], [0.587], [0.114]])
    return keep * x + (1 - keep) * np.maximum(x, 1.5 * grey + 0.5) + flakes + flakes[::-1, ::-1]


def fog(x: Array, level: int, rng: Generator, unit: float) -> Array:
    """A fractal cloud added, the brightest value kept."""
    amount, decay = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))[level]
    cloud = plasma(max(x.shape[:2]), decay=decay, rng=rng)[: x.shape[0], : x.shape[1], None]
    return (x + amount * cloud) * x.max() / (x.max() + amount)


def brightness(x: Array, level: int, rng: Generator, unit: float) -> Array:
    """The value of HSV raised by c, hue and saturation kept."""
    old = x.max(2, keepdims=True)
    new = np.minimum(old + (0.1, 0.2, 0.3, 0.4, 0.5)[level], 1)
    return np.where(old > 0, x / np.maximum(old, 1e-9) * new, new)


def contrast(x: Array, level: int, rng: Generator, unit: float) -> Array:
    """Distance from the mean of each channel times c."""
    mean = x.mean((0, 1))
    return (x - mean) * (0.4, 0.3, 0.2, 0.1, 0.05)[level] + mean


def elastic(x: Array, level: int, rng: Generator, unit: float) -> Array:
    """A random affine map, then a random smooth displacement. 244 for 224 is the published slip of a digit."""
    amount, sigma, shift = (
        (2, 0.7, 0.1),
        (2, 0.08, 0.2),
        (0.05, 0.01, 0.02),
        (0.07, 0.01, 0.02),
        (0.12, 0.01, 0.02),
    )[level]
    h, w = x.shape[:2]
    centre, side = np.array([w // 2, h // 2]), min(h, w) // 3
    before = centre + side * np.array([[1, 1], [1, -1], [-1, -1]])  # three points (x, y)
    after = before + 244 * unit * rng.uniform(-shift, shift, (3, 2))
    fields = (smoothed(rng.uniform(-1, 1, _grid(x, unit)), 244 * sigma) for _ in range(2))
    dx, dy = (244 * unit * amount * _fitted(field, x) for field in fields)
    row, column = np.mgrid[:h, :w]
    back = np.linalg.lstsq(np.c_[after, np.ones(3)], before, rcond=None)[0]  # (3, 2): where a point came from
    place = np.stack([column + dx, row + dy, np.ones((h, w))], -1) @ back  # (H, W, 2)
    at = [place[..., 1], place[..., 0]]
    return np.stack([ndimage.map_coordinates(x[..., c], at, order=1, mode="mirror") for c in range(3)], -1)


def pixelate(x: Array, level: int, rng: Generator, unit: float) -> Array:
    """A share c of the pixels per side."""
    (h, w), share = x.shape[:2], (0.6, 0.5, 0.4, 0.3, 0.25)[level]
    small = _picture(x).resize((max(1, int(w * share)), max(1, int(h * share))), Image.Resampling.BOX)
    return np.asarray(small.resize((w, h), Image.Resampling.BOX)) / 255


def jpeg(x: Array, level: int, rng: Generator, unit: float) -> Array:
    """Stored as JPEG of quality c."""
    stored = io.BytesIO()
    _picture(x).save(stored, "JPEG", quality=(25, 18, 15, 10, 7)[level])
    return np.asarray(Image.open(stored, formats=["JPEG"])) / 255


CORRUPTIONS: Mapping[str, Operation] = {
    "gaussian-noise": gaussian_noise,
    "shot-noise": shot_noise,
    "impulse-noise": impulse_noise,
    "defocus-blur": defocus_blur,
    "glass-blur": glass_blur,
    "motion-blur": motion_blur,
    "zoom-blur": zoom_blur,
    "snow": snow,
    "fog": fog,
    "brightness": brightness,
    "contrast": contrast,
    "elastic": elastic,
    "pixelate": pixelate,
    "jpeg": jpeg,
    "gaussian-blur": gaussian_blur,
}
STANDARD = tuple(name for name in CORRUPTIONS if name != "gaussian-blur")
"""What ImageNet-C averages over, but for frost."""


def plasma(side: int, *, decay: float, rng: Generator) -> Array:
    """A cloud in [0, 1] (S, S) that wraps around, S the power of two from ``side`` on: diamond-square (Fournier 1982).

    Each halving of the step divides the random part by decay squared, as the published code does.
    """
    size = 1 << max(1, (side - 1).bit_length())
    height, step, spread = np.zeros((size, size)), size, 1.0

    def moved(mean: Array) -> Array:
        return mean + spread * rng.uniform(-1, 1, mean.shape)

    while step >= 2:
        half = step // 2
        corners = height[::step, ::step]
        across = corners + np.roll(corners, -1, 1)
        height[half::step, half::step] = centres = moved((across + np.roll(across, -1, 0)) / 4)
        height[::step, half::step] = moved((across + centres + np.roll(centres, 1, 0)) / 4)
        down = corners + np.roll(corners, -1, 0)
        height[half::step, ::step] = moved((down + centres + np.roll(centres, 1, 1)) / 4)
        step, spread = half, spread / decay**2
    height -= height.min()
    return height / max(height.max(), 1e-12)


def smoothed(field: Array, sigma: float) -> Array:
    """A Gaussian, cut at three deviations, over (H, W) reflected at its edges, whatever its width.

    The reflection makes it a product in the cosine transform.
    """
    response = _response(field.shape[0], sigma)[:, None] * _response(field.shape[1], sigma)
    return fft.idctn(fft.dctn(field) * response)


@lru_cache(maxsize=32)
def _response(size: int, sigma: float) -> Array:
    """(size,) what is left of each cosine."""
    offset = np.arange(-int(3 * sigma + 0.5), int(3 * sigma + 0.5) + 1)
    weight = np.exp(-(offset**2) / (2 * sigma**2))
    return np.cos(pi / size * np.arange(size)[:, None] * offset) @ (weight / weight.sum())


def _grid(x: Array, unit: float) -> tuple[int, int]:
    """The size of ``x`` were its shorter side 224: what is random there has the published scale."""
    return max(1, round(x.shape[0] / unit)), max(1, round(x.shape[1] / unit))


def _fitted(field: Array, x: Array) -> Array:
    """A field resized to (H, W), averaged where it shrinks."""
    if field.shape == x.shape[:2]:
        return field
    picture = Image.fromarray(field.astype(np.float32)).resize((x.shape[1], x.shape[0]), Image.Resampling.BILINEAR)
    return np.asarray(picture)


def _moved(x: Array, radius: int, sigma: float, angle: float, unit: float) -> Array:
    """(H, W, C) smeared one way: Gaussian weights at 0 .. 2 radius steps of ``unit`` pixels, edges repeated."""
    steps = np.arange(2 * radius + 1)
    weights, half = np.exp(-(steps**2) / (2 * sigma**2)), ceil(2 * radius * unit) + 1
    kernel = np.zeros((2 * half + 1, 2 * half + 1))
    row, column = half + steps * unit * sin(angle), half + steps * unit * cos(angle)
    top, left = np.floor(row).astype(int), np.floor(column).astype(int)
    down, right = row - top, column - left
    for dy, vertical in ((0, 1 - down), (1, down)):
        for dx, horizontal in ((0, 1 - right), (1, right)):
            np.add.at(kernel, (top + dy, left + dx), weights * vertical * horizontal)
    return _filtered(x, kernel / weights.sum(), pad="edge")


def _filtered(x: Array, kernel: Array, *, pad: str) -> Array:
    """(H, W, C), odd kernel -> its weighted mean around each pixel."""
    rows, columns = (side // 2 for side in kernel.shape)
    padded = np.pad(x, ((rows, rows), (columns, columns), (0, 0)), mode=pad)  # type: ignore[call-overload]
    return signal.fftconvolve(padded, kernel[::-1, ::-1, None], mode="valid", axes=(0, 1))


def _gaussian(x: Array, sigma: float) -> Array:
    return ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest", truncate=4)


def _picture(x: Array) -> Image.Image:
    return Image.fromarray(np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8))
