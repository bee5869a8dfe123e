"""Scenes to pixels: B pictures with up to K objects each, drawn back to front on an S x S canvas.

Coordinates run from -1 to 1, y down. An object is a shape with a radius and an angle, coloured by its texture, perhaps
cut in two, perhaps with a rim; a plate with a glyph covers the upper left corner.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from clipgraft_toyworld.shapes import lookup
from clipgraft_toyworld.world import BACKGROUND_RGB, COLOR_RGB, Jitter, Scene

OBJECTS = 3
"""K: the largest number of objects in a picture."""
NOISE = 0.03
GLYPHS = (
    ("1....1", ".1..1.", "..11..", "..11..", ".1..1.", "1....1"),
    (".1111.", "1....1", "1....1", "1....1", "1....1", ".1111."),
    ("111111", "111111", "..11..", "..11..", "..11..", "..11.."),
    ("11....", "11....", "11....", "11....", "111111", "111111"),
)
PLATE = 8 / 32
"""Side of the glyph plate in image sides."""


@dataclass(frozen=True)
class Objects:
    """Geometry of B x K objects; every field (B, K), `centre` (B, K, 2)."""

    centre: Tensor
    radius: Tensor
    angle: Tensor
    visible: Tensor
    shape: Tensor
    color: Tensor
    texture: Tensor
    state: Tensor
    presence: Tensor
    opacity: Tensor


@dataclass(frozen=True)
class Picture:
    """Rendered scenes: `image` (B, 3, S, S) in [0, 1]; `instances` (B, K, S, S) visible coverage of each object in

    [0, 1]; `semantics` (B, S, S) int64, 0 for background and 1 + shape elsewhere.
    """

    image: Tensor
    instances: Tensor
    semantics: Tensor


@functools.cache
def canvas(size: int) -> tuple[Tensor, Tensor]:
    """x and y (S, S) of the pixel centres."""
    line = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    return x.contiguous(), y.contiguous()


@functools.cache
def _plates(size: int) -> Tensor:
    """(glyphs, P, P) brightness of the plates at this image size."""
    bitmaps = torch.tensor([[[cell == "1" for cell in row] for row in glyph] for glyph in GLYPHS]).float()
    return F.interpolate(F.pad(1 - bitmaps, (1, 1, 1, 1), value=1.0)[:, None], size=round(PLATE * size))[:, 0]


def place(scene: Scene, jitter: Jitter) -> Objects:
    """Where the objects of each scene stand: quantity, position, perspective and orientation become geometry."""
    base = torch.where(scene.perspective == 1, 0.66, 0.48) * jitter.scale  # (B,)
    radius = base * torch.tensor([1.0, 0.80, 0.70])[scene.quantity]
    side = torch.tensor([[-1, 0], [1, 0], [0, -1], [0, 1.0]])[scene.position] * 0.26
    # Two stand across the axis of their position, three in a triangle.
    across = torch.where((scene.position >= 2)[:, None], torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))  # (B, 2)
    pair = torch.stack([-across, across, torch.zeros_like(across)], 1) * 0.82
    triangle = torch.tensor([[0, -0.78], [-0.76, 0.5], [0.76, 0.5]]).expand(len(scene), 3, 2)
    quantity = scene.quantity[:, None, None]
    spread = torch.where(quantity == 1, pair, torch.where(quantity == 2, triangle, torch.zeros_like(pair)))
    centre = (side + jitter.shift)[:, None] + spread * base[:, None, None]

    def each(value: Tensor) -> Tensor:
        return value[:, None].expand(-1, OBJECTS)

    return Objects(
        centre=centre,
        radius=each(radius),
        angle=each(scene.orientation * math.pi + jitter.angle),
        visible=torch.arange(OBJECTS) <= scene.quantity[:, None],
        shape=each(scene.shape),
        color=each(scene.color),
        texture=each(scene.texture),
        state=each(scene.state),
        presence=each(scene.presence),
        opacity=each(torch.ones(len(scene))),
    )


def backdrop(background: Tensor, jitter: Jitter, *, size: int) -> tuple[Tensor, torch.Generator]:
    """Empty pictures (B, 3, S, S) over backgrounds (B,), and the generator that goes on to draw the pixel noise."""
    rng = torch.Generator().manual_seed(jitter.noise_seed)
    x, y = canvas(size)
    clouds = torch.randn(len(background), 1, size // 4, size // 4, generator=rng) * 0.05
    slope = jitter.gradient[:, :1, None] * x + jitter.gradient[:, 1:, None] * y  # (B, S, S)
    shade = F.interpolate(clouds, size=(size, size), mode="bilinear") + slope[:, None]
    base = (torch.tensor(BACKGROUND_RGB)[background] + jitter.backdrop)[:, :, None, None]
    return base + shade, rng


def draw(
    objects: Objects,
    background: Tensor,
    jitter: Jitter,
    *,
    size: int,
    glyph: Tensor | None = None,
    noise: float = NOISE,
) -> Picture:
    """Objects over backgrounds (B,), a plate with glyphs (B,) if given; equal jitter gives equal noise."""
    image, rng = backdrop(background, jitter, size=size)
    count = len(background)
    x, y = canvas(size)
    rows, slots = objects.visible.nonzero(as_tuple=True)  # V objects that are there

    def seen(field: Tensor) -> Tensor:
        return field[rows, slots]

    radius, angle, centre = (
        seen(objects.radius)[:, None, None],
        seen(objects.angle)[:, None, None],
        seen(objects.centre),
    )
    dx, dy = (x - centre[:, :1, None]) / radius, (y - centre[:, 1:, None]) / radius  # (V, S, S)
    u, v = angle.cos() * dx + angle.sin() * dy, angle.cos() * dy - angle.sin() * dx
    pixels = radius * (size / 2)  # pixels per object unit
    split = (seen(objects.state) == 1)[:, None, None]
    # A split object: two halves pushed apart along the object's own axis.
    gap = 0.17
    v_body = torch.where(split, v - gap * v.sign(), v)
    outside = lookup(seen(objects.shape), u, v_body)
    outside = torch.where(split, torch.maximum(outside, gap - v.abs()), outside) * pixels
    body = (0.5 - outside).clamp_(0, 1)
    rim_width = size * (1.9 / 32)
    rim = (rim_width + 0.5 - outside).clamp_(0, 1) * (seen(objects.presence) == 1)[:, None, None]
    coverage = torch.maximum(body, rim) * seen(objects.opacity)[:, None, None]  # (V, S, S)

    texture = seen(objects.texture)[:, None, None]
    stripes = ((v * (math.pi / 0.42)).sin() > 0) & (texture == 1)
    checks = ((u * (math.pi / 0.62)).sin() * (v * (math.pi / 0.62)).sin() > 0) & (texture == 2)
    paint = (torch.tensor(COLOR_RGB)[seen(objects.color)] + jitter.tint[rows])[:, :, None, None]
    paint = torch.where(stripes[:, None], 0.45 * paint + 0.55, paint.expand(-1, -1, size, size))
    paint = torch.where(checks[:, None], 0.4 * paint, paint)
    rim_shade = torch.where(background[rows] % 3 == 0, 1.0, 0.0)[:, None, None, None]  # white on the dark backgrounds
    paint = rim_shade + (paint - rim_shade) * body[:, None]

    instances = torch.zeros(count, OBJECTS, size, size)
    for slot in range(OBJECTS):
        here = (slots == slot).nonzero()[:, 0]
        if len(here):
            row, over = rows[here], coverage[here][:, None]
            image[row] += (paint[here] - image[row]) * over
            instances[row] *= 1 - over
            instances[row, slot] = over[:, 0]
    if glyph is not None:
        side = round(PLATE * size)
        image[:, :, :side, :side] = _plates(size)[glyph][:, None]
        instances[:, :, :side, :side] = 0
    if noise:
        image += torch.randn(image.shape, generator=rng) * noise
    share, front = instances.max(1)
    semantics = torch.where(share > 0.5, objects.shape.gather(1, front.flatten(1)).view_as(front) + 1, 0)
    return Picture(image=image.clamp_(0, 1), instances=instances, semantics=semantics)


def render(scene: Scene, jitter: Jitter, *, size: int, noise: float = NOISE) -> Picture:
    """Scenes to pictures of `size` pixels."""
    return draw(place(scene, jitter), scene.background, jitter, size=size, glyph=scene.glyph, noise=noise)


def without_objects(objects: Objects) -> Objects:
    """The same geometry with nothing visible: renders the bare background."""
    return replace(objects, visible=torch.zeros_like(objects.visible))
