"""Data sources for what plugins do beyond classes and captions: inspection, videos, segmentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field

from clipgraft.data.base import Sample
from clipgraft.errors import unknown_name
from clipgraft_toyworld.captions import DEFECTS, MOTIONS, TEMPLATES
from clipgraft_toyworld.crowds import crowds
from clipgraft_toyworld.defects import inspections
from clipgraft_toyworld.motion import videos
from clipgraft_toyworld.pairs import as_bytes
from clipgraft_toyworld.sources import WorldConfig, fingerprint
from clipgraft_toyworld.world import COLORS, SHAPES, Split, class_names


class DefectsConfig(WorldConfig):
    """Inspection pictures."""

    shapes: tuple[str, ...] = Field(SHAPES, min_length=1, description="object shapes to inspect")
    damaged: float = Field(0.5, ge=0, le=1, description="share of damaged objects")


class CrowdsConfig(WorldConfig):
    """Two objects per picture."""

    segments: Literal["shape", "color"] = Field("shape", description="what the labels of semantics say of an object")


class VideosConfig(WorldConfig):
    """Short videos."""

    n: int = Field(512, gt=0, description="number of videos")
    frames: int = Field(8, ge=2, le=32, description="pictures per video")
    stride: int = Field(1, ge=1, le=8, description="distance of two frames; 2 takes every second of a longer video")
    shapes: tuple[str, ...] = Field(SHAPES, min_length=1, description="object shapes to show")
    label: Literal["motion", "object-motion"] = Field(
        "motion", description="the ten motions, or a shape with a motion, such as moon moving left"
    )
    motions: tuple[str, ...] = Field(MOTIONS, min_length=1, description="motions to show")
    combinations: Literal["all", "even", "odd"] = Field(
        "all", description="half of the pairs of a shape and a motion, such that either half shows all of both"
    )
    calm: bool = Field(
        False, description="what doesn't move stays as in a picture, so that frames tell the kind of motion"
    )
    order: Literal["forward", "shuffled"] = Field(
        "forward", description="shuffled: every video's frames in an order of its own, so that no class tells it"
    )


def _places(chosen: Sequence[str], names: Sequence[str]) -> torch.Tensor:
    """(len(names),) place of each name among the chosen, -1 where it is not."""
    return torch.tensor([list(chosen).index(name) if name in chosen else -1 for name in names])


class Defects:
    """`toyworld/defects`: one object per picture, label 0 flawless or 1 damaged, `extra["mask"]` (S, S) uint8 0/1."""

    def __init__(
        self,
        *,
        split: Split = "train",
        n: int = 2048,
        size: int = 32,
        seed: int = 0,
        shapes: Sequence[str] = SHAPES,
        damaged: float = 0.5,
    ) -> None:
        for shape in shapes:
            if shape not in SHAPES:
                raise unknown_name("shape", shape, SHAPES)
        self.name = "toyworld/defects"
        self.fingerprint = fingerprint(
            self.name, split=split, n=n, size=size, seed=seed, shapes=tuple(shapes), damaged=damaged
        )
        self.classes: Sequence[str] = ("flawless object", "damaged object")
        self.templates: Sequence[str] = TEMPLATES
        self.attributes: Mapping[str, Sequence[str]] = {
            "kind": ("flawless", *DEFECTS),
            "shape": SHAPES,
            "color": COLORS,
        }
        data = inspections(split, n=n, size=size, seed=seed, shapes=shapes, damaged=damaged)
        self._pixels = as_bytes(data.image)
        self._masks = data.mask.to(torch.uint8)
        self._kind = data.kind.tolist()
        self._shape, self._color = data.scene.shape.tolist(), data.scene.color.tolist()
        self._prefix = f"{split}-{seed}-"

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, index: int) -> Sample:
        kind, shape, color = self._kind[index], self._shape[index], self._color[index]
        condition = f"with {DEFECTS[kind - 1]}" if kind else "flawless"
        return Sample(
            id=f"{self._prefix}{range(len(self))[index]}",
            image=self._pixels[index],
            captions=(f"a {COLORS[color]} {SHAPES[shape]} {condition}",),
            label=int(kind > 0),
            attributes={"kind": kind, "shape": shape, "color": color},
            extra={"mask": self._masks[index]},
        )


class Videos:
    """`toyworld/videos`: ten motions; `extra["frames"]` (T, 3, S, S) uint8, `image` is the first frame.

    With the label object-motion classes are the `shapes` times the `motions`, in this order. A video's shuffled order
    depends on its number and the seed alone. Even `combinations` are those whose places among shapes and motions add up
    to an even number; the others are odd.
    """

    def __init__(
        self,
        *,
        split: Split = "train",
        n: int = 512,
        size: int = 32,
        seed: int = 0,
        frames: int = 8,
        stride: int = 1,
        shapes: Sequence[str] = SHAPES,
        label: Literal["motion", "object-motion"] = "motion",
        motions: Sequence[str] = MOTIONS,
        combinations: Literal["all", "even", "odd"] = "all",
        calm: bool = False,
        order: Literal["forward", "shuffled"] = "forward",
    ) -> None:
        for what, chosen_names, known in (("shape", shapes, SHAPES), ("motion", motions, MOTIONS)):
            for name in chosen_names:
                if name not in known:
                    raise unknown_name(what, name, known)
        self.name = "toyworld/videos"
        chosen = {} if tuple(shapes) == SHAPES else {"shapes": tuple(shapes)}
        chosen |= {} if label == "motion" else {"label": label}
        chosen |= {} if tuple(motions) == MOTIONS else {"motions": tuple(motions)}
        chosen |= {} if combinations == "all" else {"combinations": combinations}
        chosen |= {"calm": True} if calm else {}
        chosen |= {} if stride == 1 else {"stride": stride}
        chosen |= {} if order == "forward" else {"order": order}
        self.fingerprint = fingerprint(self.name, split=split, n=n, size=size, seed=seed, frames=frames, **chosen)
        self.attributes: Mapping[str, Sequence[str]] = {"shape": SHAPES, "color": COLORS}
        self._data = videos(
            split,
            n=n,
            size=size,
            seed=seed,
            frames=(frames - 1) * stride + 1,
            shapes=[SHAPES.index(shape) for shape in shapes],
            motions=[MOTIONS.index(motion) for motion in motions],
            parity={"all": None, "even": 0, "odd": 1}[combinations],
            calm=calm,
        )
        self._frames = self._data.frames[:, ::stride]
        self._order = None
        if order == "shuffled":
            drawn = [torch.Generator().manual_seed(seed * 2**20 + int(number)) for number in self._data.number]
            self._order = torch.stack([torch.randperm(frames, generator=rng) for rng in drawn])
        moves = _places(motions, MOTIONS)[self._data.label]
        if label == "motion":
            self.classes: Sequence[str] = tuple(motions)
            self.templates: Sequence[str] = ("a video of an object {}", "object {}", "video of a object {}")
            self._labels = moves.tolist()
        else:
            pairs = [(row, column) for row in range(len(shapes)) for column in range(len(motions))]
            if combinations != "all":
                pairs = [pair for pair in pairs if sum(pair) % 2 == (combinations == "odd")]
            self.classes = [f"{shapes[row]} {motions[column]}" for row, column in pairs]
            self.templates = ("a video of a {}", "a {}", "{}")
            rows = _places(shapes, SHAPES)[self._data.scene.shape].tolist()
            self._labels = [pairs.index(pair) for pair in zip(rows, moves.tolist(), strict=True)]
        self._prefix = f"{split}-{seed}-"

    def __len__(self) -> int:
        return len(self._data.frames)

    def __getitem__(self, index: int) -> Sample:
        motion = MOTIONS[int(self._data.label[index])]
        shape, color = int(self._data.scene.shape[index]), int(self._data.scene.color[index])
        frames = self._frames[index]
        frames = frames if self._order is None else frames[self._order[index]]
        return Sample(
            id=f"{self._prefix}{int(self._data.number[index])}",
            image=frames[0],
            captions=(f"a video of a {COLORS[color]} {SHAPES[shape]} {motion}",),
            label=self._labels[index],
            attributes={"shape": shape, "color": color},
            extra={"frames": frames},
        )


class Crowds:
    """`toyworld/crowds`: two different objects per picture for segmentation.

    `extra`: `instances` (3, S, S) and `semantics` (S, S) uint8, 0 background and 1 + index in `segments`, the shapes
    or the colours; `label` is the class of the first object.
    """

    def __init__(
        self,
        *,
        split: Split = "train",
        n: int = 2048,
        size: int = 32,
        seed: int = 0,
        segments: Literal["shape", "color"] = "shape",
    ) -> None:
        self.name = "toyworld/crowds"
        told = {} if segments == "shape" else {"segments": segments}
        self.fingerprint = fingerprint(self.name, split=split, n=n, size=size, seed=seed, **told)
        self.classes: Sequence[str] = class_names()
        self.segments: Sequence[str] = SHAPES if segments == "shape" else COLORS
        self.templates: Sequence[str] = TEMPLATES
        self.attributes: Mapping[str, Sequence[str]] = {
            "shape": SHAPES,
            "color": COLORS,
            "other_shape": SHAPES,
            "other_color": COLORS,
        }
        data = crowds(split, n=n, size=size, seed=seed)
        self._pixels = as_bytes(data.picture.image)
        self._instances = (data.picture.instances > 0.5).to(torch.uint8)
        self._semantics = data.picture.semantics.to(torch.uint8)
        if segments == "color":  # the two shapes of a picture differ, so its shapes name its objects
            by_shape = torch.zeros(len(data.shape), 1 + len(SHAPES), dtype=torch.uint8)
            by_shape.scatter_(1, 1 + data.shape, (1 + data.color).to(torch.uint8))
            self._semantics = by_shape.gather(1, self._semantics.flatten(1).long()).view_as(self._semantics)
        self._values = torch.stack([data.shape[:, 0], data.color[:, 0], data.shape[:, 1], data.color[:, 1]], 1).tolist()
        self._prefix = f"{split}-{seed}-"

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, index: int) -> Sample:
        shape, color, other_shape, other_color = self._values[index]
        first, second = SHAPES[shape], SHAPES[other_shape]
        return Sample(
            id=f"{self._prefix}{range(len(self))[index]}",
            image=self._pixels[index],
            captions=(f"a {COLORS[color]} {first} and a {COLORS[other_color]} {second}",),
            negatives=(f"a {COLORS[other_color]} {first} and a {COLORS[color]} {second}",),
            label=color * len(SHAPES) + shape,
            attributes={"shape": shape, "color": color, "other_shape": other_shape, "other_color": other_color},
            extra={"instances": self._instances[index], "semantics": self._semantics[index]},
        )
