"""What crosses module borders while tensors flow.

Shape legend: B batch, D joint embedding, W tower width, N patch tokens, h x w token grid, H x W' pixels, L text length.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F


def widened(x: Tensor) -> Tensor:
    """``x`` with 16-bit floats as fp32: losses are computed in full precision whatever autocast did to the towers."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


@dataclass(frozen=True, slots=True)
class FeatureRequest:
    """What the caller needs beside the pooled embedding. ``layers`` are block indices, negative from the end."""

    tokens: bool = False
    layers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """Image tower output.

    ``pooled`` (B, D) in the joint space, not normalised. On request: ``tokens`` (B, N, W) row-major patch tokens after
    the tower's last norm, without prefix tokens; ``cls`` (B, W); ``grid`` (h, w) with h*w == N;
    ``layers`` {block index: (B, N, W)} before the last norm.
    """

    pooled: Tensor
    tokens: Tensor | None = None
    cls: Tensor | None = None
    grid: tuple[int, int] | None = None
    layers: dict[int, Tensor] = field(default_factory=dict)

    def unit(self) -> Tensor:
        """(B, D) of length one."""
        return F.normalize(self.pooled, dim=-1)

    def map(self) -> Tensor:
        """(B, W, h, w): the patch tokens as a feature map."""
        if self.tokens is None or self.grid is None:
            raise ValueError("no patch tokens here; ask for them with FeatureRequest(tokens=True)")
        return self.tokens.transpose(1, 2).reshape(len(self.tokens), -1, *self.grid)


@dataclass(frozen=True, slots=True)
class TextFeatures:
    """Text tower output: ``pooled`` (B, D) not normalised; ``tokens`` (B, L, W); ``mask`` (B, L) of real tokens."""

    pooled: Tensor
    tokens: Tensor | None = None
    mask: Tensor | None = None

    def unit(self) -> Tensor:
        """(B, D) of length one."""
        return F.normalize(self.pooled, dim=-1)


@dataclass(slots=True)
class Batch:
    """One training batch on one rank.

    ``pixels`` (B, 3, H, W') float in [0, 1], **not** normalised: a stage calls ``encoder.preprocess.normalize``.
    ``text`` (B, L) token ids of one caption each, when the data has captions and the stage asked for them.
    ``labels`` (B,) class indices. ``attributes`` {name: (B,)} further labels. ``extra`` {name: (B, ...)} what a
    plugin's source adds (masks, frames). ``ids`` name the samples in error messages.
    """

    pixels: Tensor
    ids: list[str]
    text: Tensor | None = None
    labels: Tensor | None = None
    attributes: dict[str, Tensor] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.pixels)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same batch on ``device``."""

        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=non_blocking)
            return {k: move(v) for k, v in value.items()} if isinstance(value, dict) else value

        return replace(self, **{f.name: move(getattr(self, f.name)) for f in fields(self)})

    def __getitem__(self, rows: slice) -> Batch:
        """The rows of ``rows``, as a batch (used to split a batch into chunks)."""

        def take(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: v[rows] for k, v in value.items()}
            return None if value is None else value[rows]

        return replace(self, **{f.name: take(getattr(self, f.name)) for f in fields(self)})


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one forward of a training stage returns: scalar ``loss``, named scalar ``terms``, ``size`` samples."""

    loss: Tensor
    terms: dict[str, Tensor]
    size: int
