"""X-CLIP's head: a transformer over frames, and prompts that a video's patches write for every class.

Ni et al., Expanding Language-Image Pretrained Models for General Video Recognition, ECCV 2022, arXiv 2208.02816.
"""

from __future__ import annotations

import torch
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft.types import FeatureRequest, ImageFeatures
from clipgraft_video.blocks import resample
from clipgraft_video.heads import VideoFeatures, VideoHead


class Integration(nn.Module):
    """Multi-frame integration: frames (B, T, D) -> (B, D). v = mean_T(Blocks(c + E) + c)."""

    def __init__(self, dim: int, frames: int, *, heads: int, layers: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(frames, dim) * dim**-0.5)
        blocks = [ResidualAttentionBlock(dim, heads, act_layer=QuickGELU) for _ in range(layers)]
        self.resblocks = nn.ModuleList(blocks)

    def forward(self, frames: Tensor) -> Tensor:
        """Another number of frames than was trained for takes interpolated positions."""
        x = frames + resample(self.positional_embedding, frames.shape[1]).to(frames.dtype)
        for block in self.resblocks:
            x = block(x)
        return (x + frames).mean(1)


class CrossAttention(nn.Module):
    """Texts (B, K, D) look at patches (B, N, D): no bias but the output's."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=False) for _ in "qkv")
        self.proj = nn.Linear(dim, dim)

    def forward(self, texts: Tensor, patches: Tensor) -> Tensor:
        """-> (B, K, D)."""
        pairs = ((self.q_proj, texts), (self.k_proj, patches), (self.v_proj, patches))
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f, x in pairs)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj(out)  # type: ignore[no-any-return]


class PromptLayer(nn.Module):
    """t + CA(LN t), then t + MLP(LN t)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.cross_attn = CrossAttention(dim, heads)
        self.norm1, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), QuickGELU(), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, texts: Tensor, patches: Tensor) -> Tensor:
        """-> (B, K, D)."""
        texts = texts + self.cross_attn(self.norm1(texts), patches)
        return texts + self.mlp(self.norm3(texts))


class VideoPrompts(nn.Module):
    """What a video adds to each text: alpha * Layers(c, LN(p)), alpha (D,) at ``alpha`` first."""

    def __init__(self, dim: int, *, heads: int, layers: int, alpha: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.decoder = nn.ModuleList([PromptLayer(dim, heads) for _ in range(layers)])
        self.alpha = nn.Parameter(torch.full((dim,), alpha))

    def forward(self, texts: Tensor, patches: Tensor) -> Tensor:
        """Texts (K, D), patches (B, N, D) -> (B, K, D)."""
        seen, found = self.norm(patches), texts.expand(len(patches), -1, -1)
        for layer in self.decoder:
            found = layer(found, seen)
        return self.alpha * found


class XClipHead(VideoHead):
    """Scores of a video: exp(s) <v / |v|, t / |t|> with t = c + alpha * prompts(c, patches).

    Patches are those of the last block before its norm, projected and averaged over frames.
    """

    want = FeatureRequest(layers=(-1,))
    raw_texts = True

    def __init__(
        self, width: int, dim: int, frames: int, *, mit_layers: int = 1, prompt_layers: int = 2, alpha: float = 0.1
    ) -> None:
        super().__init__()
        heads = max(dim // 64, 1)
        self.mit = Integration(dim, frames, heads=heads, layers=mit_layers)
        self.prompts_visual_ln = nn.LayerNorm(width)
        self.prompts_visual_proj = nn.Parameter(torch.randn(width, dim) * width**-0.5)
        self.prompts = VideoPrompts(dim, heads=heads, layers=prompt_layers, alpha=alpha)

    def forward(self, image: ImageFeatures, frames: int) -> VideoFeatures:
        """Frames (B T, D) and their last patches -> the video, and its patches in the joint space as ``tokens``."""
        each = image.pooled.unflatten(0, (-1, frames))
        patches = self.prompts_visual_ln(image.layers[-1]) @ self.prompts_visual_proj
        return VideoFeatures(self.mit(each), each, patches.unflatten(0, (-1, frames)))

    def logits(self, video: VideoFeatures, texts: Tensor, scale: Tensor) -> Tensor:
        """Raw texts (K, D) -> (B, K); a class's score does not depend on the others."""
        assert video.tokens is not None
        texts = texts.to(video.pooled.dtype)
        told = texts + self.prompts(texts, video.tokens.mean(1))
        return scale * torch.einsum("bd,bkd->bk", video.unit(), F.normalize(told, dim=-1))
