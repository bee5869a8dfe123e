"""What makes one embedding, and scores for texts, of a video's frames. B videos, T frames, K texts, D joint space."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft.config.schema import Config
from clipgraft.errors import InputError
from clipgraft.types import FeatureRequest, ImageFeatures, widened

Pool = Literal["mean_raw", "mean_norm", "mean_logits"]
POOLS: tuple[Pool, ...] = get_args(Pool)


@dataclass(frozen=True, slots=True)
class VideoFeatures:
    """``pooled`` (B, D) of the video, not normalised; ``frames`` (B, T, D) of its frames, not normalised;

    ``tokens`` (B, T, N, W) patch tokens where the head asked for them.
    """

    pooled: Tensor
    frames: Tensor
    tokens: Tensor | None = None

    def unit(self) -> Tensor:
        """(B, D) of length one."""
        return F.normalize(self.pooled, dim=-1)


class VideoHead(nn.Module, ABC):
    """From the image tower's features of B T frames to a video's. ``want``: what it asks of the tower.

    ``raw_texts``: its scores need text embeddings as they are, not of length one.
    """

    want: FeatureRequest = FeatureRequest()
    raw_texts: bool = False
    registered: tuple[str, dict[str, Any]]

    @abstractmethod
    def forward(self, image: ImageFeatures, frames: int) -> VideoFeatures:
        """Features of B T frames, T = ``frames`` -> of B videos."""

    def logits(self, video: VideoFeatures, texts: Tensor, scale: Tensor) -> Tensor:
        """``texts`` (K, D), of length one unless ``raw_texts``, and the exponentiated ``scale`` () -> (B, K) scores."""
        return scale * video.unit() @ texts.T


class MeanConfig(Config):
    """Settings of ``video/mean``."""

    pool: Pool = Field(
        "mean_raw", description="mean of frames as they are (ViFi-CLIP, EZ-CLIP), of unit frames, or of their scores"
    )


class Mean(VideoHead):
    """The mean over frames: blind to their order. Three different functions, by ``pool``.

    ``mean_raw`` normalises the mean of raw frames (ViFi-CLIP, EZ-CLIP), ``mean_norm`` that of unit frames (TempMe,
    Prompt Switch); ``mean_logits`` averages scores of unit frames and never normalises (FROSTER).
    """

    def __init__(self, pool: Pool = "mean_raw") -> None:
        super().__init__()
        if pool not in POOLS:
            raise InputError(f"there is no pooling {pool!r}; known: {', '.join(POOLS)}")
        self.pool = pool
        self.registered = ("video/mean", {"pool": pool})

    def forward(self, image: ImageFeatures, frames: int) -> VideoFeatures:
        """Mean over T, by ``pool``."""
        each = widened(image.pooled).unflatten(0, (-1, frames))  # (B, T, D)
        rows = each if self.pool == "mean_raw" else F.normalize(each, dim=-1)
        return VideoFeatures(rows.mean(1), each)

    def logits(self, video: VideoFeatures, texts: Tensor, scale: Tensor) -> Tensor:
        """As every head, but ``mean_logits`` leaves the mean of unit frames at its length, which is below one."""
        if self.pool == "mean_logits":
            return scale * video.pooled @ texts.T
        return super().logits(video, texts, scale)


def mean(pool: Pool = "mean_raw") -> Mean:
    """``video/mean``."""
    return Mean(pool)
