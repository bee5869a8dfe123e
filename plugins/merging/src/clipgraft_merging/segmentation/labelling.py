"""A label for every pixel: patches against words, at the resolution that was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from clipgraft.config.schema import Config
from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft_merging.segmentation.patches import Path, patch_embeddings, step_of, why_no_patches
from clipgraft_merging.segmentation.pictures import Frame, Shape, target_size
from clipgraft_merging.segmentation.vocabulary import Vocabulary


class ReadingConfig(Config):
    """How pictures reach the image tower."""

    dense: Path = Field("last", description="last: the last tokens; value: the last block's value path (MaskCLIP)")
    size: int | None = Field(
        None, gt=0, description="shorter side at which pictures are read [pixels]; null: the tower's own"
    )
    shape: Shape = Field("squash", description="squash reads pictures as squares; keep holds their aspect ratio")
    batch_size: int = Field(16, gt=0, description="pictures per forward pass")

    def reader(self, encoder: Encoder) -> PatchReader:
        """The reader of an encoder's patches."""
        return PatchReader(encoder, dense=self.dense, size=self.size, shape=self.shape)


class PatchReader:
    """Patch embeddings of pictures of an encoder, without gradient."""

    def __init__(self, encoder: Encoder, *, dense: Path, size: int | None, shape: Shape) -> None:
        if problem := why_no_patches(encoder.image, path=dense):
            raise InputError(problem)
        self.encoder, self.dense = encoder, dense
        self.side, self.shape = size, shape
        self.parameter = next(encoder.image.parameters())

    def size_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) [pixels] at which a picture of (H, W') is read."""
        native = self.encoder.preprocess.size
        return target_size(size, side=self.side, native=native, step=step_of(self.encoder.image), shape=self.shape)

    def pixels(self, frames: Sequence[Frame], size: tuple[int, int]) -> Tensor:
        """(B, 3, h, w) in [0, 1]."""
        return torch.stack([frame.pixels(self.encoder.preprocess, size) for frame in frames]).to(self.parameter.device)

    @torch.no_grad()
    def maps(self, frames: Sequence[Frame], size: tuple[int, int]) -> Tensor:
        """(B, D, h', w') of pictures that are read at ``size``."""
        pixels = self.encoder.preprocess.normalize(self.pixels(frames, size).to(self.parameter.dtype))
        return patch_embeddings(self.encoder.image, pixels, path=self.dense).map().float()


def enlarged(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Scores of one picture (K, h, w) -> (1, K, H, W'), bilinear."""
    return F.interpolate(scores[None], size=size, mode="bilinear", align_corners=False)


def decided(vocabulary: Vocabulary, scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Cosines of one picture on the patch grid (K, h, w) -> labels (H, W'): enlarged, then decided."""
    return vocabulary.decide(enlarged(scores, size))[0]


def semantics_of(frame: Frame, source: Any) -> Tensor:
    """(H, W') int64 labels of a picture; ``InputError`` when they have another size."""
    truth = frame.extra("semantics", source).long()
    if tuple(truth.shape) != frame.size:
        raise InputError(
            f"{source.name}: the mask of {frame.sample.id} is {tuple(truth.shape)}, its picture {frame.size}; they "
            "must have one size"
        )
    return truth
