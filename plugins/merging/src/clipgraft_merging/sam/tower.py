"""SAM's image tower (ViTDet) at any image size, up to its neck and through it.

transformers' own encoder refuses every size but the configured one. The weights here are that encoder's, under its
names; only the forward is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from clipgraft.errors import InputError
from clipgraft_merging.sam.attention import block


@dataclass(frozen=True, slots=True)
class SamTokens:
    """``tokens`` (B, N, W) row-major after the last block, before the neck; ``grid`` (h, w) with h*w == N;

    ``layers`` {block index as it was asked for: (B, N, W)}.
    """

    tokens: Tensor
    grid: tuple[int, int]
    layers: dict[int, Tensor] = field(default_factory=dict)


class SamTower(nn.Module):
    """transformers' ``SamVisionEncoder`` with pixels (B, 3, H, W') of any multiple of the patch.

    ``attention``: "lean" never builds the matrix of relative positions (see ``lean_attention``); "reference" runs
    transformers' own attention, whose output at the native size is equal to the bit. ``recompute`` runs every block
    again in the backward pass instead of keeping what it computed.
    """

    reaches_into_blocks = True

    def __init__(
        self, encoder: Any, *, attention: Literal["lean", "reference"] = "lean", recompute: bool = False
    ) -> None:
        super().__init__()
        self.encoder, self.attention, self.recompute = encoder, attention, recompute
        config = encoder.config
        self.width, self.channels, self.depth = config.hidden_size, config.output_channels, len(encoder.layers)
        self.patch, self.native = int(config.patch_size), int(config.image_size)
        self.window = int(config.window_size)

    def grid_of(self, pixels: Tensor) -> tuple[int, int]:
        """(h, w) of the tokens of pixels (B, 3, H, W'); ``InputError`` for sides that are no multiple of the patch."""
        height, width = pixels.shape[-2:]
        if height % self.patch or width % self.patch or not height or not width:
            down, up = max(height // self.patch, 1) * self.patch, -(-height // self.patch) * self.patch
            raise InputError(
                f"SAM's tower takes sides that are multiples of its patch of {self.patch} pixels, got {height} x "
                f"{width}; resize to, say, {down} or {up}"
            )
        return height // self.patch, width // self.patch

    def positions(self, grid: tuple[int, int]) -> Tensor | None:
        """(1, h, w, W) of the absolute positions, bicubic; the stored ones, untouched, at the native grid."""
        stored = self.encoder.pos_embed
        if stored is None or tuple(stored.shape[1:3]) == grid:
            return stored  # type: ignore[no-any-return]
        resized = F.interpolate(
            stored.permute(0, 3, 1, 2).float(), size=grid, mode="bicubic", antialias=True, align_corners=False
        )
        return resized.permute(0, 2, 3, 1).to(stored.dtype)

    def tokens(self, pixels: Tensor, layers: Sequence[int] = ()) -> SamTokens:
        """Standardised pixels (B, 3, H, W') -> tokens before the neck, and those after the blocks named by index."""
        grid = self.grid_of(pixels)
        if bad := [i for i in layers if not -self.depth <= i < self.depth]:
            raise InputError(f"layer {bad[0]} was asked of a tower of {self.depth} blocks")
        x = self.encoder.patch_embed.projection(pixels).permute(0, 2, 3, 1)
        if (positions := self.positions(grid)) is not None:
            x = x + positions
        kept, lean = {}, self.attention == "lean"
        for number, layer in enumerate(self.encoder.layers):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, layer, x, lean=lean, use_reentrant=False)
            else:
                x = block(layer, x, lean=lean)
            kept |= {i: x.flatten(1, 2) for i in layers if i % self.depth == number}
        return SamTokens(x.flatten(1, 2), grid, kept)

    def neck(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens (B, N, W) on their grid (h, w) -> what the mask decoder reads, (B, C, h, w)."""
        return self.encoder.neck(tokens.unflatten(1, grid))  # type: ignore[no-any-return]

    def forward(self, pixels: Tensor) -> Tensor:
        """Standardised pixels (B, 3, H, W') -> (B, C, h, w), as transformers' encoder."""
        found = self.tokens(pixels)
        return self.neck(found.tokens, found.grid)
