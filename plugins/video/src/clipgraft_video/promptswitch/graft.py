"""Prompt Switch's tower: a cube of prompts beside a chunk of frames, transposed before every attention.

N frames in chunks of P; frame f of a chunk carries the P tokens of row f of the cube behind its own L tokens.
Deng et al., Prompt Switch: Efficient CLIP Adaptation for Text-Video Retrieval, ICCV 2023, arXiv 2308.07648.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft.config.schema import Config
from clipgraft.encoders.base import DEFAULT_REQUEST, Encoder, ImageEncoder
from clipgraft.encoders.towers import VitImage
from clipgraft.errors import InputError
from clipgraft.types import FeatureRequest, ImageFeatures
from clipgraft_video.blocks import FrameBlock, replace_blocks
from clipgraft_video.clock import Clock
from clipgraft_video.model import CLOCK


def switched(x: Tensor, prompts: int) -> Tensor:
    """(N, L + P, W): in every chunk token j of frame f changes places with token f of frame j."""
    cube = x[:, -prompts:].unflatten(0, (-1, prompts)).transpose(1, 2).flatten(0, 1)
    return torch.cat([x[:, :-prompts], cube], 1)


class SwitchBlock(FrameBlock):
    """x + Attn(switched(LN1 x)), then the MLP: two frames of a chunk exchange one token each; residuals stay behind."""

    def __init__(self, block: Any, clock: Clock, *, prompts: int) -> None:
        super().__init__(block, clock)
        self.prompts = prompts

    def mix(self, x: Tensor) -> Tensor:
        """(N, L + P, W) -> the same."""
        seen = switched(self.ln_1(x), self.prompts)
        return self.feed_forward(x + self.ls_1(self.attend(seen, seen)))


class Aggregation(nn.Module):
    """Class tokens (B, G, W) of a group of frames look at all its prompts (B, G P, W); nothing is added at first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        nn.init.zeros_(self.attn.out_proj.weight)
        nn.init.zeros_(self.attn.out_proj.bias)

    def forward(self, classes: Tensor, prompts: Tensor) -> Tensor:
        """-> (B, G, W)."""
        return classes + self.attn(classes, prompts, prompts, need_weights=False)[0]  # type: ignore[no-any-return]


class SwitchVit(ImageEncoder):
    """An open_clip ViT with ``SwitchBlock``s, a ``cube`` (P, P, W) and an aggregation over groups of ``frames``.

    Groups know nothing of each other. A picture alone is a video that stands still: the mean of its unit frames.
    """

    def __init__(self, image: VitImage, *, prompts: int, frames: int) -> None:
        super().__init__()
        self.tower, self.embed_dim, self.width, self.depth = image.tower, image.embed_dim, image.width, image.depth
        self.prompts, self.frames = prompts, frames
        self.cube = nn.Parameter(torch.randn(prompts, prompts, self.width) * 0.02 * self.width**-0.5)
        blocks: Any = self.tower.transformer.resblocks
        self.aggregation = Aggregation(self.width, blocks[0].attn.num_heads)

    @property
    def grid(self) -> None:  # type: ignore[override]
        """It gives no patch tokens."""
        return None

    def new_parameters(self) -> list[nn.Parameter]:
        """What CLIP doesn't have."""
        return [self.cube, *self.aggregation.parameters()]

    def forward(self, pixels: Tensor, want: FeatureRequest = DEFAULT_REQUEST) -> ImageFeatures:
        """Standardised pixels (B T, 3, H, W') -> pooled (B T, D), one per frame."""
        if want.tokens or want.layers:
            raise InputError("video/prompt-switch gives embeddings of frames, no patch tokens; ask for the pooled one")
        clock: Clock = getattr(self, CLOCK)
        if clock.frames > 1 and clock.frames % self.frames:
            raise InputError(
                f"this model takes groups of {self.frames} frames, got {clock.frames}; set frames to a multiple"
            )
        tower, x = self.tower, self.tower._embeds(pixels)
        if clock.frames == 1:
            x = x.repeat_interleave(self.frames, 0)
        x = torch.cat([x, self.cube.to(x.dtype).repeat(len(x) // self.prompts, 1, 1)], 1)
        x = tower.transformer(x).unflatten(0, (-1, self.frames))  # (groups, G, L + P, W)
        classes = self.aggregation(x[:, :, 0], x[:, :, -self.prompts :].flatten(1, 2))
        pooled = tower.ln_post(classes)
        pooled = pooled if tower.proj is None else pooled @ tower.proj
        return ImageFeatures(F.normalize(pooled, dim=-1).mean(1) if clock.frames == 1 else pooled.flatten(0, 1))


class PromptSwitchGraft(Config):
    """``video/prompt-switch``: a cube of prompts that frames exchange, and an aggregation of them."""

    portable: ClassVar[bool] = False

    prompts: int = Field(6, gt=1, description="frames of a chunk, each with as many prompts")
    frames: int = Field(6, gt=1, description="frames of a group, whose prompts are aggregated; a multiple of prompts")

    def apply(self, encoder: Encoder) -> Encoder:
        """Change the tower; the cube is random and small, the aggregation adds nothing at first."""
        image, what = encoder.image, "video/prompt-switch"
        if self.frames % self.prompts:
            raise InputError(f"{what}: frames {self.frames} are no multiple of prompts {self.prompts}; make them one")
        if not isinstance(image, VitImage) or image.tower.attn_pool is not None or image.tower.pool_type != "tok":
            raise InputError(f"{what} needs an open_clip ViT with a class token; {encoder.data.origin.uri} has none")
        device = next(image.parameters()).device
        clock = replace_blocks(encoder, lambda _, b, clock: SwitchBlock(b, clock, prompts=self.prompts), what=what)
        encoder.image = SwitchVit(image, prompts=self.prompts, frames=self.frames)
        setattr(encoder.image, CLOCK, clock)
        encoder.image.to(device)
        return encoder

    def merge(self, encoder: Encoder) -> Encoder:
        """A cube between frames is no weight of a plain tower."""
        return encoder
