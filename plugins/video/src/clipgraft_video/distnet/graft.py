"""DiST's tower: a frozen CLIP that sees every alpha-th frame, and trained networks beside it that see all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from clipgraft.config.schema import Config
from clipgraft.encoders.base import DEFAULT_REQUEST, Encoder, ImageEncoder
from clipgraft.encoders.towers import VitImage
from clipgraft.errors import InputError
from clipgraft.types import FeatureRequest, ImageFeatures, widened
from clipgraft_video.clock import Clock
from clipgraft_video.distnet.network import Network
from clipgraft_video.heads import VideoFeatures, VideoHead
from clipgraft_video.model import CLOCK, HEAD


@dataclass(frozen=True, slots=True)
class DistFeatures(ImageFeatures):
    """``pooled`` (B T, D): every frame has its video's embedding. ``spatial`` (B T', D): CLIP's own of what it saw."""

    spatial: Tensor | None = None


class DistHead(VideoHead):
    """The video's embedding; outside of training ``clip_share`` of the scores are CLIP's own, the mean over frames."""

    def __init__(self, clip_share: float = 0.0) -> None:
        super().__init__()
        self.clip_share = clip_share

    def forward(self, image: ImageFeatures, frames: int) -> VideoFeatures:
        """One row per video of what the tower repeated; ``frames`` (B, T', D) are CLIP's."""
        assert isinstance(image, DistFeatures) and image.spatial is not None
        pooled = widened(image.pooled).unflatten(0, (-1, frames))[:, 0]
        return VideoFeatures(pooled, widened(image.spatial).unflatten(0, (len(pooled), -1)))

    def logits(self, video: VideoFeatures, texts: Tensor, scale: Tensor) -> Tensor:
        """(1 - share) exp(s) cos(v, t) + share exp(s) mean_t cos(f_t, t)."""
        scores = super().logits(video, texts, scale)
        if self.training or not self.clip_share:
            return scores
        own = scale * F.normalize(video.frames, dim=-1).mean(1) @ texts.T
        return (1 - self.clip_share) * scores + self.clip_share * own


class DistVit(ImageEncoder):
    """An open_clip ViT, run without gradient on every ``alpha``-th frame, with a ``Network`` on its tokens.

    A picture alone is a video that stands still: the tower reads it once, the network sees it ``frames`` times.
    """

    def __init__(self, image: VitImage, network: Network, *, layers: tuple[int, ...], frames: int, alpha: int) -> None:
        super().__init__()
        self.tower, self.embed_dim, self.width, self.depth = image.tower, image.embed_dim, image.width, image.depth
        self.network, self.layers, self.frames, self.alpha = network, layers, frames, alpha

    @property
    def grid(self) -> None:  # type: ignore[override]
        """It gives no patch tokens."""
        return None

    def forward(self, pixels: Tensor, want: FeatureRequest = DEFAULT_REQUEST) -> ImageFeatures:
        """Standardised pixels (B T, 3, H, W') -> ``DistFeatures``; T is a multiple of ``alpha``, or 1."""
        if want.tokens or want.layers:
            raise InputError("video/dist gives one embedding per video and no patch tokens; ask for the pooled one")
        clock: Clock = getattr(self, CLOCK)
        if clock.frames > 1 and clock.frames % self.alpha:
            raise InputError(
                f"video/dist shows every {self.alpha}. frame to its frozen tower; {clock.frames} frames are no multiple"
            )
        clips = clock.videos(pixels)  # (B, T, 3, H, W')
        tokens, spatial = self._seen(clips[:, :: self.alpha].flatten(0, 1))
        tokens = [x.unflatten(0, (len(clips), -1)) for x in tokens]
        if clock.frames == 1:
            clips = clips.expand(-1, self.frames, -1, -1, -1)
            tokens = [x.expand(-1, self.frames // self.alpha, -1, -1) for x in tokens]
        video = self.network(clips, tokens)
        return DistFeatures(video.repeat_interleave(clock.frames, 0), spatial=spatial)

    @torch.no_grad()
    def _seen(self, pixels: Tensor) -> tuple[list[Tensor], Tensor]:
        """Frames (N, 3, H, W') -> tokens (N, L, W) of each chosen layer before the last norm, and embeddings (N, D)."""
        tower = self.tower
        x, taken = tower.transformer.forward_intermediates(tower._embeds(pixels), indices=list(self.layers))
        pooled, _ = tower._pool(x)
        return taken, pooled if tower.proj is None else pooled @ tower.proj


class DistGraft(Config):
    """``video/dist``: trained networks for space and time beside a frozen image tower."""

    portable: ClassVar[bool] = False

    frames: int = Field(16, gt=1, description="frames per video that the networks see; a multiple of alpha")
    alpha: int = Field(2, gt=0, description="the frozen tower sees every alpha-th frame")
    width: int = Field(384, gt=0, multiple_of=4, description="of the integration; heads have 64")
    temporal_width: int = Field(96, gt=0, description="of the temporal network [channels]")
    rounds: int = Field(4, gt=0, description="of adaptive pooling")
    layers: tuple[int, ...] = Field((), description="blocks of the tower that are read, in order; empty for all")
    clip_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the frozen CLIP in the scores of a test; 0.5 for other classes than were trained",
    )

    def apply(self, encoder: Encoder) -> Encoder:
        """Put the networks beside the tower; new weights are random."""
        image, what = encoder.image, "video/dist"
        if getattr(image, CLOCK, None) is not None:
            raise InputError(f"{what}: the tower mixes frames already; graft one way of doing so onto a plain CLIP")
        if not isinstance(image, VitImage) or image.tower.attn_pool is not None:
            raise InputError(f"{what} needs an open_clip ViT with a class token, {encoder.data.origin.uri} has another")
        if self.frames % self.alpha:
            raise InputError(f"{what}: frames {self.frames} are no multiple of alpha {self.alpha}; make them one")
        layers = self.layers or tuple(range(image.depth))
        if list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < image.depth:
            raise InputError(f"{what}: layers {layers} must rise from 0 to {image.depth - 1} at most")
        if self.width > 64 and self.width % 64:
            raise InputError(f"{what}: heads have 64 channels, so width is a multiple of 64; got {self.width}")
        network = Network(
            image.width,
            image.embed_dim,
            layers=len(layers),
            patch=image.tower.patch_size,
            frames=self.frames,
            alpha=self.alpha,
            width=self.width,
            temporal=self.temporal_width,
            rounds=self.rounds,
        )
        device = next(image.parameters()).device
        encoder.image = DistVit(image, network, layers=layers, frames=self.frames, alpha=self.alpha)
        setattr(encoder.image, CLOCK, Clock())
        setattr(encoder.image, HEAD, DistHead(self.clip_share))
        encoder.image.to(device)
        return encoder

    def merge(self, encoder: Encoder) -> Encoder:
        """Networks beside a tower are no weights of it."""
        return encoder
