"""WinCLIP (Jeong et al., WinCLIP: Zero-/Few-Shot Anomaly Classification and Segmentation, CVPR 2023, arXiv

2303.14814): windows of several sizes are compared with written prompts and, few-shot, with normal pictures' windows.

O kinds of part, R reference pictures of each; nothing is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional as F

from clipgraft.config.schema import Config
from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft_anomaly.dense import DenseTower, Resampling
from clipgraft_anomaly.detector import Detection, Detector, DetectorHead, Fits
from clipgraft_anomaly.handwritten import UNNAMED, Texts, WordsConfig
from clipgraft_anomaly.same_data import DataRecord
from clipgraft_anomaly.scoring import TAU, gaussian, probabilities
from clipgraft_anomaly.windows import Precision, Views, WindowTower, harmonic, spread, window_patches

MEMORY_ROWS = 1024
"""Rows of the memory that a picture is compared with at a time."""


class WindowsConfig(Config):
    """How pictures are cut into windows and scored."""

    size: int | None = Field(None, gt=0, description="input side, a multiple of the patch; null: the tower's [pixels]")
    resampling: Resampling = Field("bilinear", description="of position embeddings for another size")
    scales: tuple[int, ...] = Field((2, 3), min_length=1, description="sides of the windows [patches]")
    tau: float = Field(TAU, gt=0, description="temperature of the softmax over normal and anomalous")
    combine: Literal["mean", "sum"] = Field(
        "mean",
        description="few-shot map: mean of both maps, as in the paper; sum, as public code has it (the same ranks)",
    )
    sigma: float = Field(0.0, ge=0, description="smoothing of maps; neither the paper nor public code has any [pixels]")
    chunk: int = Field(2048, gt=0, description="windows per forward pass; fewer need less memory")
    precision: Precision = Field("fp32", description="of the image tower; bf16 and fp16 are for GPUs")

    @field_validator("scales")
    @classmethod
    def _different(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value) or min(value) < 1:
            raise ValueError("scales must be different and above 0")
        return value

    def dense(self, encoder: Encoder) -> DenseTower:
        """The tower at this size; raises when it, or a scale, doesn't fit."""
        dense = DenseTower(encoder.image, size=self.size, resampling=self.resampling)
        for k in self.scales:
            window_patches(dense.grid, k)
        return dense


class MemoryConfig(Config):
    """What was gathered; made by the recipe winclip."""

    objects: tuple[str, ...] = Field((), description="kinds of part whose normal pictures are remembered")
    shots: int = Field(0, ge=0, description="remembered pictures of each")
    grid: tuple[int, int] = Field((0, 0), description="patches of a picture, rows and columns")
    seen: DataRecord = Field(DataRecord(), description="the remembered pictures, to recognise them in a test set")


class WinClipConfig(Config):
    """The head ``anomaly/winclip``; without a memory it is zero-shot and fits any tower that can be read."""

    words: WordsConfig = WordsConfig()
    windows: WindowsConfig = WindowsConfig()
    memory: MemoryConfig = MemoryConfig()
    fits: Fits = Fits()


class WinClip(DetectorHead):
    """The memory: unit vectors ``patches`` (O, R, N, W) and, for each scale k, ``windows_k`` (O, R, M, D)."""

    patches: Tensor

    def __init__(self, *, words: WordsConfig, windows: WindowsConfig, memory: MemoryConfig, fits: Fits) -> None:
        super().__init__()
        self.words, self.windows, self.memory, self.fits = words, windows, memory, fits
        parts = {"words": words, "windows": windows, "memory": memory, "fits": fits}
        self.registered = ("anomaly/winclip", {name: part.model_dump() for name, part in parts.items()})
        if memory.shots and (windows.size is None or not memory.objects or not fits.width):
            raise InputError("a memory of normal pictures is made by the recipe winclip; run it, then give its run")
        if memory.shots:
            shape, (h, w) = (len(memory.objects), memory.shots), memory.grid
            self.register_buffer("patches", torch.zeros(*shape, h * w, fits.width))
            for k in windows.scales:
                count = len(window_patches(memory.grid, k))
                self.register_buffer(f"windows_{k}", torch.zeros(*shape, count, fits.embed_dim))

    @property
    def scales(self) -> Mapping[int, Tensor]:
        """{k: (O, R, M, D)}."""
        return {k: getattr(self, f"windows_{k}") for k in self.windows.scales}

    def remember(self, name: str, views: Views) -> None:
        """Take ``shots`` pictures in as the memory of an object."""
        at = self.memory.objects.index(name)
        self.patches[at] = F.normalize(views.patches, dim=-1)
        for k, kept in self.scales.items():
            kept[at] = F.normalize(views.windows[k], dim=-1)

    def detector(self, encoder: Encoder) -> WinClipDetector:
        """The detector over ``encoder``, which needs a text tower."""
        return WinClipDetector(encoder, self)


class WinClipDetector(Detector):
    """Scores of whole pictures, windows and patches, put together (sections 3.2 and 3.3)."""

    method: ClassVar[str] = "winclip"
    named: ClassVar[bool] = True
    kept_patches: Tensor

    def __init__(self, encoder: Encoder, head: WinClip) -> None:
        super().__init__()
        self.encoder, self.settings, self.memory = encoder, head.windows, head.memory
        dense = head.windows.dense(encoder)
        self.size, self.grid = dense.size, dense.grid
        self.tower = WindowTower(
            dense, scales=head.windows.scales, chunk=head.windows.chunk, precision=head.windows.precision
        )
        self.texts = Texts(encoder, head.words)
        self.trained_on = head.memory.seen
        if head.memory.shots:
            self.register_buffer("kept_patches", head.patches)
            for k, kept in head.scales.items():
                self.register_buffer(f"kept_windows_{k}", kept)

    def forward(self, pixels: Tensor, names: Sequence[str] | None = None) -> Detection:
        """Pixels (B, 3, S, S) in [0, 1] -> scores and maps."""
        called = self.called([UNNAMED] * len(pixels) if names is None else names)
        views = self.views(pixels)
        score, local = self.zero_shot(views, self.texts(called, device=pixels.device))
        if self.memory.shots:
            near = self.few_shot(views, called)
            score = (score + near.flatten(1).amax(1)) / 2
            local = local + near if self.settings.combine == "sum" else (local + near) / 2
        maps = F.interpolate(local[:, None], self.size, mode="bilinear", align_corners=False)[:, 0]
        return Detection(score, gaussian(maps, self.settings.sigma))

    def views(self, pixels: Tensor) -> Views:
        """Pixels (B, 3, S, S) in [0, 1] -> what the tower says of pictures, windows and patches."""
        found: Views = self.tower(self.encoder.preprocess.normalize(pixels))
        return found

    def called(self, names: Sequence[str]) -> list[str]:
        """Names of the memory. Pictures that nobody names are of its only kind; one that it doesn't hold is refused."""
        objects = self.memory.objects
        if not self.memory.shots:
            return list(names)
        found = [objects[0] if name == UNNAMED and len(objects) == 1 else name for name in names]
        if strange := [name for name in found if name not in objects]:
            raise InputError(
                f"no normal pictures of {strange[0]!r} were gathered, the detector knows {', '.join(objects)}; run "
                "the recipe winclip on it too, or with shots=0 for a detector of any object"
            )
        return found

    def zero_shot(self, views: Views, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Texts (B, 2, D) -> scores (B,) of pictures, and (B, h, w), the harmonic mean over them and all scales."""
        tau, shape = self.settings.tau, (-1, *self.grid)
        whole = probabilities(views.whole, texts, tau=tau)[:, 1]
        maps = [whole[:, None, None].expand(shape)]
        for k, found in views.windows.items():
            maps.append(spread(probabilities(found, texts, tau=tau)[..., 1], self.grid, k))
        return whole, harmonic(maps)

    def few_shot(self, views: Views, names: Sequence[str]) -> Tensor:
        """(B, h, w): the mean over scales of how far the nearest remembered vector is (eq. 4)."""
        maps = [self._nearest(views.patches, names, self.kept_patches).view(-1, *self.grid)]
        for k, found in views.windows.items():
            kept = getattr(self, f"kept_windows_{k}")
            maps.append(spread(self._nearest(found, names, kept), self.grid, k))
        return torch.stack(maps).mean(0)

    def _nearest(self, x: Tensor, names: Sequence[str], kept: Tensor) -> Tensor:
        """(B, M, D) against (O, R, M, D) of each picture's own kind -> (B, M) of (1 - cosine) / 2 to the nearest."""
        x, highest = F.normalize(x, dim=-1), x.new_full(x.shape[:2], -1.0)
        kinds = list(dict.fromkeys(names))
        for kind in kinds:
            rows = slice(None) if len(kinds) == 1 else [i for i, name in enumerate(names) if name == kind]
            for some in torch.split(kept[self.memory.objects.index(kind)].flatten(0, 1), MEMORY_ROWS):
                highest[rows] = torch.maximum(highest[rows], (x[rows] @ some.T).amax(-1))
        return ((1 - highest) / 2).clamp(min=0)

    def header(self) -> dict[str, Any]:
        """Method, size, words, windows and what the memory holds."""
        told = self.memory.model_dump(include={"objects", "shots"})
        return super().header() | {
            "words": self.texts.words.model_dump(),
            "windows": self.settings.model_dump(),
            "memory": told | {"reference": self.memory.seen.reference},
        }
