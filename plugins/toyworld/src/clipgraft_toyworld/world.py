"""The vocabulary of the toy world and how its scenes are drawn by lot, split by split.

Shapes: B scenes. A scene is one object class (shape x colour) plus nine details, one for each visual pattern on which
CLIP was found blind (MMVP, "Eyes Wide Shut?", table 1).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from clipgraft.errors import InputError

WORLD_VERSION = "1"
"""Written into every model trained here; change it with anything that changes a pixel or a word."""

SHAPES = ("triangle", "arrow", "heart", "moon", "tee", "spoon", "ell", "crown")
COLORS = ("red", "green", "blue", "yellow", "purple", "cyan", "orange", "pink")
COLOR_RGB = (
    (0.86, 0.12, 0.12),
    (0.10, 0.65, 0.18),
    (0.13, 0.25, 0.90),
    (0.93, 0.86, 0.12),
    (0.55, 0.15, 0.75),
    (0.12, 0.80, 0.85),
    (0.95, 0.52, 0.08),
    (0.98, 0.55, 0.75),
)
BACKGROUND_RGB = ((0.08, 0.08, 0.08), (0.45, 0.45, 0.45), (0.92, 0.92, 0.92), (0.42, 0.28, 0.16))


@dataclass(frozen=True)
class Detail:
    """One attribute that short captions rarely name: its field in `Scene`, MMVP's pattern, one phrase per value."""

    name: str
    pattern: str
    phrases: tuple[str, ...]


DETAILS = (
    Detail("orientation", "orientation and direction", ("upright", "upside down")),
    Detail("presence", "presence of specific features", ("bare edge", "rimmed edge")),
    Detail("state", "state and condition", ("whole body", "split body")),
    Detail("quantity", "quantity and count", ("only one", "two of them", "three of them")),
    Detail(
        "position", "positional and relational context", ("on the left", "on the right", "at the top", "at the bottom")
    ),
    Detail(
        "background",
        "color and appearance",
        ("black background", "gray background", "white background", "brown background"),
    ),
    Detail(
        "texture", "structural and physical characteristics", ("plain surface", "striped surface", "checkered surface")
    ),
    Detail("glyph", "text", ("saying x", "saying o", "saying t", "saying l")),
    Detail("perspective", "viewpoint and perspective", ("far away", "close up")),
)
DETAIL_NAMES = tuple(detail.name for detail in DETAILS)
SIZES = {"shape": len(SHAPES), "color": len(COLORS), **{detail.name: len(detail.phrases) for detail in DETAILS}}
"""Number of values of each attribute."""
CLASSES = len(SHAPES) * len(COLORS)

Split = Literal["train", "tune", "test"]
Stream = Literal["images", "pairs", "defects", "videos", "crowds", "text"]
SPLITS: tuple[Split, ...] = ("train", "tune", "test")
STREAMS: tuple[Stream, ...] = ("images", "pairs", "defects", "videos", "crowds", "text")
BLOCK = 256
"""Scenes drawn from one generator: scene i depends on (split, stream, seed, i // BLOCK), never on the total."""


@dataclass(frozen=True)
class Scene:
    """B scenes, every field (B,) int64 and below its number in `SIZES`."""

    shape: Tensor
    color: Tensor
    orientation: Tensor
    presence: Tensor
    state: Tensor
    quantity: Tensor
    position: Tensor
    background: Tensor
    texture: Tensor
    glyph: Tensor
    perspective: Tensor

    def __len__(self) -> int:
        return len(self.shape)

    def __getitem__(self, index: Tensor | slice) -> Scene:
        """The scenes at `index`: an int64 or boolean (B',) tensor, or a slice."""
        return Scene(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    def value(self, name: str) -> Tensor:
        """(B,) values of the attribute `name`."""
        if name not in SIZES:
            raise InputError(f"the toy world has no attribute {name!r}; it has {', '.join(SIZES)}")
        result: Tensor = getattr(self, name)
        return result

    def coarse(self) -> Tensor:
        """(B,) class number in 0..CLASSES-1: colour-major, as `class_names`."""
        return self.color * len(SHAPES) + self.shape

    def with_values(self, **values: Tensor) -> Scene:
        """A copy in which the named attributes are replaced by (B,) tensors."""
        return replace(self, **values)


@dataclass(frozen=True)
class Jitter:
    """What no caption names: (B, ...) small displacements and tints, and the seed of the pixel noise."""

    shift: Tensor  # (B, 2) in half image sides
    angle: Tensor  # (B,) radians
    scale: Tensor  # (B,) about 1
    tint: Tensor  # (B, 3)
    backdrop: Tensor  # (B, 3)
    gradient: Tensor  # (B, 2)
    noise_seed: int


def class_names() -> list[str]:
    """The 64 class names in the order of `Scene.coarse`."""
    return [f"{color} {shape}" for color in COLORS for shape in SHAPES]


def generator(split: Split, *, stream: Stream, seed: int, block: int) -> torch.Generator:
    """A generator that belongs to one (split, stream, seed, block) and to no other.

    torch's CPU engine looks at the low 32 bits of a seed only, so the four numbers are packed into 32 bits:
    2 for the split, 3 for the stream, 11 for the seed and 16 for the block.
    """
    if split not in SPLITS or stream not in STREAMS:
        raise InputError(f"unknown split {split!r} or stream {stream!r}; expected one of {SPLITS} and {STREAMS}")
    if not 0 <= seed < 2**11 or not 0 <= block < 2**16:
        raise InputError(f"seed {seed} or block {block} is out of range; use a seed in 0..2047 and a block in 0..65535")
    packed = ((SPLITS.index(split) * 8 + STREAMS.index(stream)) * 2**11 + seed) * 2**16 + block
    return torch.Generator().manual_seed(packed)


def sample_scene(n: int, rng: torch.Generator) -> Scene:
    """n scenes with independent, uniform attributes."""
    return Scene(**{name: torch.randint(size, (n,), generator=rng) for name, size in SIZES.items()})


def sample_jitter(n: int, rng: torch.Generator) -> Jitter:
    """n jitters, wide enough that no pixel alone tells an attribute."""

    def centred(width: float, *shape: int) -> Tensor:
        return (torch.rand(n, *shape, generator=rng) - 0.5) * width

    return Jitter(
        shift=centred(0.10, 2),
        angle=centred(0.24),
        scale=1 + centred(0.10),
        tint=centred(0.12, 3),
        backdrop=centred(0.10, 3),
        gradient=centred(0.16, 2),
        noise_seed=int(torch.randint(2**31, (1,), generator=rng)),
    )


def join(scenes: list[Scene]) -> Scene:
    """Several scene batches as one."""
    return Scene(**{f.name: torch.cat([getattr(scene, f.name) for scene in scenes]) for f in fields(Scene)})
