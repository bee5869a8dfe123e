"""EZ-CLIP's tower: temporal prompts that let frames exchange through the blocks' own frozen attention, and adapters.

Ahmad et al., EZ-CLIP: Efficient Zero-Shot Video Action Recognition, arXiv 2312.08010 (its successor is called T2L).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft.config.schema import Config
from clipgraft.encoders.base import Encoder
from clipgraft.encoders.towers import ClipText
from clipgraft.errors import InputError
from clipgraft_video.blocks import FrameBlock, replace_blocks
from clipgraft_video.clock import Clock


class Adapter(nn.Module):
    """x + W2 gelu(W1 x), hidden width a quarter, the identity at first: (..., W) -> (..., W)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, width // 4), nn.Linear(width // 4, width)
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        """-> (..., W)."""
        return x + self.fc2(F.gelu(self.fc1(x)))


class TemporalPromptBlock(FrameBlock):
    """One more token per frame: a_t of Attn(LN1(P + mean_L x)) over T, by the block's own attention, without residual.

    It is appended before the block's attention and dropped behind it; then the adapter, then the MLP.
    """

    def __init__(self, block: Any, clock: Clock, *, frames: int, dropout: float) -> None:
        super().__init__(block, clock)
        bound = (6 / (3 * 16**2 + self.width)) ** 0.5  # the official code takes patches of 16 for every tower
        self.temporal_prompt = nn.Parameter(torch.empty(frames, self.width).uniform_(-bound, bound))
        self.adapter, self.dropout = Adapter(self.width), nn.Dropout(dropout)

    def mix(self, x: Tensor) -> Tensor:
        """(B T, L, W) -> the same; a picture alone uses the first frame's prompt."""
        frames = self.clock.frames
        if frames > len(self.temporal_prompt):
            raise InputError(
                f"this model has prompts for {len(self.temporal_prompt)} frames, got {frames}; choose frames so"
            )
        query = self.clock.videos(x.mean(1)) + self.dropout(self.temporal_prompt[:frames]).to(x.dtype)  # (B, T, W)
        over = self.ln_1(query)
        token = self.attend(over, over).flatten(0, 1)[:, None]
        keys = self.ln_1(torch.cat([x, token], 1))
        x = x + self.ls_1(self.attend(keys[:, :-1], keys))  # the added row is dropped, so it isn't computed
        return self.feed_forward(self.adapter(x))


class AdaptedTextBlock(FrameBlock):
    """A block of the text tower with an adapter between attention and MLP."""

    def __init__(self, block: Any, clock: Clock) -> None:
        super().__init__(block, clock)
        self.adapter = Adapter(self.width)

    def forward(
        self, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        """As open_clip calls a text block: with a causal mask."""
        seen = self.ln_1(q_x)
        mask = None if attn_mask is None else attn_mask.to(q_x.dtype)
        x = q_x + self.ls_1(self.attn(seen, seen, seen, need_weights=False, attn_mask=mask)[0])
        return self.feed_forward(self.adapter(x))


class EzClipGraft(Config):
    """``video/ez-clip``: temporal prompts and adapters in the image tower, adapters in the text tower."""

    portable: ClassVar[bool] = False

    frames: int = Field(8, gt=0, description="frames that the prompts are made for")
    dropout: float = Field(0.1, ge=0, lt=1, description="of the prompts in training")
    text_adapters: bool = Field(True, description="adapters in the text tower too")

    def apply(self, encoder: Encoder) -> Encoder:
        """Change both towers; pictures give other features than before, texts the same, until training."""
        if self.text_adapters and not isinstance(encoder.text, ClipText):
            raise InputError(
                f"video/ez-clip adapts open_clip's text tower, {encoder.data.origin.uri} has another; set "
                "text_adapters=false"
            )
        device = next(encoder.parameters()).device
        replace_blocks(
            encoder,
            lambda _, block, clock: TemporalPromptBlock(block, clock, frames=self.frames, dropout=self.dropout),
            what="video/ez-clip",
        )
        if self.text_adapters and encoder.text is not None:
            blocks: Any = encoder.text.tower.transformer.resblocks
            for index, block in enumerate(blocks):
                blocks[index] = AdaptedTextBlock(block, Clock())
        return encoder.to(device)

    def merge(self, encoder: Encoder) -> Encoder:
        """Prompts and adapters can't be folded into a plain tower."""
        return encoder
