"""X-CLIP's image tower: in every block the frames exchange messages before they look at their own patches."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from clipgraft.config.schema import Config
from clipgraft.encoders.base import Encoder
from clipgraft_video.blocks import FrameBlock, replace_blocks
from clipgraft_video.clock import Clock
from clipgraft_video.model import HEAD


class MessageBlock(FrameBlock):
    """Cross-frame attention (section 3.2): one message per frame, made from its class token, shared over the video.

    g = fc(z_cls); m = g + MHA(LN g) over T; z + MHA(LN [z; m]) keeps the rows of z; then the MLP. A message has no
    positional code and is rebuilt in every block.
    """

    def __init__(self, block: Any, clock: Clock) -> None:
        super().__init__(block, clock)
        self.message_fc = nn.Linear(self.width, self.width)
        self.message_ln = nn.LayerNorm(self.width)
        self.message_attn = nn.MultiheadAttention(self.width, max(self.width // 64, 1), batch_first=True)

    def mix(self, x: Tensor) -> Tensor:
        """(B T, L, W) -> the same."""
        given = self.clock.videos(self.message_fc(x[:, 0]))  # (B, T, W)
        heard = self.message_ln(given)
        message = given + self.message_attn(heard, heard, heard, need_weights=False)[0]
        keys = self.ln_1(torch.cat([x, message.flatten(0, 1)[:, None]], 1))
        x = x + self.ls_1(self.attend(keys[:, :-1], keys))  # the message's own row is dropped, so it isn't computed
        return self.feed_forward(x)


class XClipGraft(Config):
    """``video/x-clip``: messages between frames in every block, a transformer over frames, prompts by videos."""

    portable: ClassVar[bool] = False

    frames: int = Field(8, gt=0, description="frames that the integration's positions are made for")
    mit_layers: int = Field(1, gt=0, description="blocks of the transformer over frames")
    prompt_layers: int = Field(2, ge=0, description="layers of the video-specific prompts")
    alpha: float = Field(0.1, description="share of the prompts at first")

    def apply(self, encoder: Encoder) -> Encoder:
        """Change the tower; new weights are random (torch's usual initialisation)."""
        from clipgraft_video.xclip.head import XClipHead

        replace_blocks(encoder, lambda _, block, clock: MessageBlock(block, clock), what="video/x-clip")
        device = next(encoder.image.parameters()).device
        head = XClipHead(
            encoder.image.width,
            encoder.image.embed_dim,
            self.frames,
            mit_layers=self.mit_layers,
            prompt_layers=self.prompt_layers,
            alpha=self.alpha,
        )
        setattr(encoder.image, HEAD, head)
        encoder.image.to(device)
        return encoder

    def merge(self, encoder: Encoder) -> Encoder:
        """Messages can't be folded into a plain tower."""
        return encoder
