"""FROSTER's student tower: in every block a frame also attends to its two neighbours. No new parameter.

Huang et al., FROSTER: Frozen CLIP Is A Strong Teacher for Open-Vocabulary Action Recognition, ICLR 2024,
arXiv 2402.03241.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from clipgraft.config.schema import Config
from clipgraft.encoders.base import Encoder
from clipgraft_video.blocks import FrameBlock, replace_blocks


class NeighbourBlock(FrameBlock):
    """Queries of a frame, keys and values of it, the one before and the one behind it: 3 L keys.

    A neighbour beyond the clip's ends has keys and values of zero, which are not masked and take attention, as in the
    official code; so a single frame is not vanilla CLIP.
    """

    def mix(self, x: Tensor) -> Tensor:
        """(B T, L, W) -> the same."""
        q, k, v = self.project(self.ln_1(x))
        seen = [torch.cat([own, *self._neighbours(own)], 1) for own in (k, v)]
        return self.feed_forward(x + self.ls_1(self.scores(q, *seen)))

    def _neighbours(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B T, L, W) -> the same of the next and of the previous frame, zeros beyond the ends."""
        each = self.clock.videos(x)  # (B, T, L, W)
        after = F.pad(each[:, 1:], (0, 0, 0, 0, 0, 1))
        before = F.pad(each[:, :-1], (0, 0, 0, 0, 1, 0))
        return after.flatten(0, 1), before.flatten(0, 1)


class FrosterView(Config):
    """``video/neighbours``: frames attend to their neighbours, by the block's own weights."""

    portable: ClassVar[bool] = False

    def apply(self, encoder: Encoder) -> Encoder:
        """Change the tower; its weights stay what they were."""
        replace_blocks(encoder, lambda _, block, clock: NeighbourBlock(block, clock), what="video/neighbours")
        return encoder

    def merge(self, encoder: Encoder) -> Encoder:
        """The weights are a plain CLIP's, what they compute is not."""
        return encoder
