"""DiST's adaptive pooling: queries gather the tokens of every frame, and then the frames of a video."""

from __future__ import annotations

import torch
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from clipgraft_video.blocks import resample


def drawn(*shape: int) -> Tensor:
    """A truncated normal with deviation 0.02, as every learnt query, slot and position of DiST starts."""
    return nn.init.trunc_normal_(torch.empty(*shape), std=0.02)


class Gather(nn.Module):
    """q + Attention(LN q, LN x), then + MLP(LN q): queries (N, 1, C) look at x (N, M, C). One norm serves both."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, max(width // 64, 1), batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), QuickGELU(), nn.Linear(4 * width, width))

    def forward(self, query: Tensor, x: Tensor) -> Tensor:
        """-> (N, 1, C)."""
        keys = self.norm(x)
        query = query + self.attn(self.norm(query), keys, keys, need_weights=False)[0]
        return query + self.mlp(self.norm_mlp(query))  # type: ignore[no-any-return]


class Round(nn.Module):
    """A query per frame gathers its tokens, the video's query gathers those queries with their positions."""

    def __init__(self, width: int, slots: int) -> None:
        super().__init__()
        self.over_space, self.over_time = Gather(width), Gather(width)
        self.positions = nn.Parameter(drawn(slots, width))

    def forward(self, video: Tensor, frames: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """``video`` (B, 1, C), ``frames`` (B T', 1, C), ``tokens`` (B, T', L, C) -> both queries anew."""
        frames = self.over_space(frames, tokens.flatten(0, 1))
        each = frames.view(len(tokens), -1, frames.shape[-1])
        placed = each + resample(self.positions, each.shape[1]).to(each.dtype)
        return self.over_time(video, placed), frames


class AdaptivePooling(nn.Module):
    """``rounds`` of gathering, from learnt queries: (B, T', L, C) -> (B, C)."""

    def __init__(self, width: int, slots: int, *, rounds: int) -> None:
        super().__init__()
        self.video_query, self.frame_query = nn.Parameter(drawn(width)), nn.Parameter(drawn(width))
        self.rounds = nn.ModuleList([Round(width, slots) for _ in range(rounds)])

    def forward(self, tokens: Tensor) -> Tensor:
        """-> (B, C)."""
        b, t = tokens.shape[:2]
        video, frames = self.video_query.expand(b, 1, -1), self.frame_query.expand(b * t, 1, -1)
        for step in self.rounds:
            video, frames = step(video, frames, tokens)
        return video[:, 0]
