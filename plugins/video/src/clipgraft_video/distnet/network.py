"""DiST's trained networks: a small temporal one over all frames, and one that integrates it with the frozen CLIP.

B videos, T frames, T' = T / alpha frames that the frozen tower saw, L tokens of one with the class token first, W the
tower's width, C the integration's width, V the temporal network's, (h, w) the grid of patches.
Qing et al., Disentangling Spatial and Temporal Learning for Efficient Image-to-Video Transfer Learning, ICCV 2023,
arXiv 2309.07911.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from clipgraft_video.blocks import resample
from clipgraft_video.distnet.pooling import AdaptivePooling, drawn


class TemporalBlock(nn.Module):
    """gelu(x + Conv(1, 3, 3) gelu Conv(3, 1, 1) LN x): (B, V, T, h, w) -> the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.gelu = nn.LayerNorm(width), QuickGELU()
        self.over_time = nn.Conv3d(width, width, (3, 1, 1), padding=(1, 0, 0))
        self.over_space = nn.Conv3d(width, width, (1, 3, 3), padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """-> (B, V, T, h, w)."""
        seen = self.norm(x.movedim(1, -1)).movedim(-1, 1)
        return self.gelu(x + self.over_space(self.gelu(self.over_time(seen))))  # type: ignore[no-any-return]


class IntegrationBlock(nn.Module):
    """MLP(LN m) + TemporalMLP(LN m): (B, T', L, C) -> the same. The second convolves over T', a quarter as wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        narrow = width // 4
        self.norm, self.norm_over_time = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), QuickGELU(), nn.Linear(width, width))
        self.down, self.up = nn.Linear(width, narrow), nn.Linear(narrow, width)
        self.over_time, self.gelu = nn.Conv1d(narrow, narrow, 3, padding=1), QuickGELU()

    def forward(self, m: Tensor) -> Tensor:
        """-> (B, T', L, C)."""
        narrow = self.down(self.norm_over_time(m)).permute(0, 2, 3, 1)  # (B, L, c, T')
        mixed = self.gelu(self.over_time(narrow.flatten(0, 1))).unflatten(0, narrow.shape[:2])
        return self.mlp(self.norm(m)) + self.up(mixed.permute(0, 3, 1, 2))  # type: ignore[no-any-return]


class ToIntegration(nn.Module):
    """The temporal map for the integration: ``alpha`` frames become one by a convolution, a learnt slot is its class.

    (B, V, T, h, w) -> (B, T', L, C).
    """

    def __init__(self, temporal: int, width: int, *, alpha: int, slots: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(temporal, width, (alpha, 1, 1), stride=(alpha, 1, 1))
        self.class_slot = nn.Parameter(drawn(slots, width))

    def forward(self, x: Tensor) -> Tensor:
        """Other numbers of frames than were trained take interpolated slots."""
        patches = self.conv(x).flatten(3).permute(0, 2, 3, 1)  # (B, T', h w, C)
        slots = resample(self.class_slot, patches.shape[1]).to(patches.dtype)
        return torch.cat([slots[None, :, None].expand(len(x), -1, -1, -1), patches], 2)


class ToTemporal(nn.Module):
    """Patches of the integration for the temporal network, every frame ``alpha`` times.

    (B, T', L, C) -> (B, V, T, h, w).
    """

    def __init__(self, width: int, temporal: int, *, alpha: int) -> None:
        super().__init__()
        self.linear, self.alpha = nn.Linear(width, temporal), alpha

    def forward(self, m: Tensor, grid: Sequence[int]) -> Tensor:
        """``grid`` (h, w)."""
        patches = self.linear(m[:, :, 1:]).permute(0, 3, 1, 2).unflatten(-1, tuple(grid))
        return patches.repeat_interleave(self.alpha, 2)  # type: ignore[no-any-return]


class Network(nn.Module):
    """All that is trained: pixels of all frames and the frozen tower's tokens -> a video's embedding (B, D).

    Per layer l: t = TemporalBlock(t); m = W_l z_l + r; m' = m + ToIntegration(t); t = t + ToTemporal(m); r =
    IntegrationBlock(m'). Both exchanges read what was there before either. r + m' of the last layer is pooled.
    Deviation: the last layer's exchange into the temporal network has no reader and is left out; the official code
    has its weights, which never get a gradient.
    """

    def __init__(
        self,
        tower_width: int,
        embed_dim: int,
        *,
        layers: int,
        patch: Sequence[int],
        frames: int,
        alpha: int = 2,
        width: int = 384,
        temporal: int = 96,
        rounds: int = 4,
    ) -> None:
        super().__init__()
        slots, (high, wide) = frames // alpha, patch
        self.stem = nn.Conv3d(3, temporal, (5, high, wide), stride=(1, high, wide), padding=(2, 0, 0))
        self.inputs = nn.ModuleList([nn.Linear(tower_width, width) for _ in range(layers)])
        self.temporal = nn.ModuleList([TemporalBlock(temporal) for _ in range(layers)])
        self.integration = nn.ModuleList([IntegrationBlock(width) for _ in range(layers)])
        self.to_integration = nn.ModuleList(
            [ToIntegration(temporal, width, alpha=alpha, slots=slots) for _ in range(layers)]
        )
        self.to_temporal = nn.ModuleList([ToTemporal(width, temporal, alpha=alpha) for _ in range(layers - 1)])
        self.pooling = AdaptivePooling(width, slots, rounds=rounds)
        self.skip, self.norm = nn.Linear(tower_width, width), nn.LayerNorm(width)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv3d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        self.proj = nn.Parameter(torch.randn(width, embed_dim) * width**-0.5)

    def forward(self, pixels: Tensor, tokens: Sequence[Tensor]) -> Tensor:
        """Standardised pixels (B, T, 3, H, W'), per layer ``tokens`` (B, T', L, W) -> (B, D), not normalised."""
        t = self.stem(pixels.transpose(1, 2))
        grid, update, mixed = t.shape[-2:], torch.zeros((), dtype=t.dtype, device=t.device), t
        for index, seen in enumerate(tokens):
            t = self.temporal[index](t)
            m = self.inputs[index](seen) + update
            mixed = m + self.to_integration[index](t)
            if index < len(self.to_temporal):
                t = t + self.to_temporal[index](m, grid)
            update = self.integration[index](mixed)
        video = self.pooling(update + mixed) + self.skip(tokens[-1][:, :, 0].mean(1))
        return self.norm(video) @ self.proj  # type: ignore[no-any-return]
