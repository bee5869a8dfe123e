"""ILA's tower: in every block neighbouring frames are aligned before the block itself; X-CLIP's head follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from clipgraft.config.schema import Config
from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft.types import ImageFeatures
from clipgraft_video.blocks import FrameBlock, plain_tower, replace_blocks
from clipgraft_video.clock import Clock
from clipgraft_video.heads import VideoFeatures
from clipgraft_video.ila.alignment import Alignment, apart
from clipgraft_video.model import HEAD
from clipgraft_video.xclip.head import XClipHead

APART = "apart."
"""Blocks leave under this name, with their index, how far apart the aligned frames are."""


class AlignedBlock(FrameBlock):
    """x + W_a(aligned) + W_i(pairs), both zero at first, then the block. A frame alone has no pairs: plain block."""

    def __init__(self, block: Any, clock: Clock, *, index: int, grid: tuple[int, int], channels: int, offset: float):
        super().__init__(block, clock)
        self.index = index
        self.message_fc, self.message_ln = nn.Linear(self.width, self.width), nn.LayerNorm(self.width)
        self.message_attn = Alignment(self.width, grid=grid, channels=channels, offset=offset)
        self.temporal_skip_align_fc, self.temporal_skip_fc = (nn.Linear(self.width, self.width) for _ in "ai")
        for linear in (self.temporal_skip_align_fc, self.temporal_skip_fc):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def mix(self, x: Tensor) -> Tensor:
        """(B T, L, W) -> the same."""
        if self.clock.frames > 1:
            found = self.message_attn(self.message_ln(self.message_fc(self.clock.videos(x))))
            told = self.temporal_skip_align_fc(found.frames) + self.temporal_skip_fc(found.pairs)
            x = x + told.flatten(0, 1)
            self.clock.leave(f"{APART}{self.index}", apart(found.pooled))
        seen = self.ln_1(x)
        return self.feed_forward(x + self.ls_1(self.attend(seen, seen)))


@dataclass(frozen=True, slots=True)
class IlaFeatures(VideoFeatures):
    """``apart`` (): summed over blocks, the mean of 1 - cosine of the aligned frames."""

    apart: Tensor | None = None


class IlaHead(XClipHead):
    """X-CLIP's head, which also collects what the blocks left."""

    def __init__(self, width: int, dim: int, frames: int, *, clock: Clock, **settings: Any) -> None:
        super().__init__(width, dim, frames, **settings)
        self.clock = clock

    def forward(self, image: ImageFeatures, frames: int) -> IlaFeatures:
        """Frames (B T, D) and their last patches -> the video."""
        found = super().forward(image, frames)
        left = [value for name, value in self.clock.left.items() if name.startswith(APART)]
        total = torch.stack(left).sum() if left else found.pooled.new_zeros(())
        return IlaFeatures(found.pooled, found.frames, found.tokens, total)


class IlaGraft(Config):
    """``video/ila``: alignment of neighbouring frames in every block, a transformer over frames, prompts by videos."""

    portable: ClassVar[bool] = False

    frames: int = Field(8, gt=0, description="frames that the integration's positions are made for")
    channels: int = Field(256, gt=0, multiple_of=8, description="of the features of a pair")
    offset: float = Field(0.2, ge=0, description="distance of the nine masks of training [half pictures]")
    mit_layers: int = Field(1, gt=0, description="blocks of the transformer over frames")
    prompt_layers: int = Field(2, ge=0, description="layers of the video-specific prompts")
    alpha: float = Field(0.1, description="share of the prompts at first")

    def fits(self, encoder: Encoder) -> None:
        """``InputError`` with the fix when it doesn't suit the encoder."""
        plain_tower(encoder, what="video/ila")
        grid = encoder.image.grid
        if grid is None or min(grid) < 4:
            has = "no patches" if grid is None else f"{grid[0]} x {grid[1]}"
            raise InputError(f"video/ila aligns 4 x 4 patches or more, {encoder.data.origin.uri} has {has}")

    def apply(self, encoder: Encoder) -> Encoder:
        """Change the tower; it computes what it did until training, the head is new."""
        self.fits(encoder)
        image: Any = encoder.image
        device = next(image.parameters()).device
        clock = replace_blocks(
            encoder,
            lambda index, block, clock: AlignedBlock(
                block, clock, index=index, grid=image.grid, channels=self.channels, offset=self.offset
            ),
            what="video/ila",
        )
        head = IlaHead(
            image.width,
            image.embed_dim,
            self.frames,
            clock=clock,
            mit_layers=self.mit_layers,
            prompt_layers=self.prompt_layers,
            alpha=self.alpha,
        )
        setattr(image, HEAD, head)
        image.to(device)
        return encoder

    def merge(self, encoder: Encoder) -> Encoder:
        """Alignment can't be folded into a plain tower."""
        return encoder
