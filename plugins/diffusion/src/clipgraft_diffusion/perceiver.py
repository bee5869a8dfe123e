"""The light predictor of masked codes: a Perceiver of a few layers with random weights.

The paper names a Perceiver of six layers whose cross attention has the unmasked tokens as queries and, as keys and
values, the unmasked tokens with CLIP's projected embedding. Positions, widths, norms and the decoder are our reading.
Shapes: B batch, L positions of which U are shown and M hidden, d_q width of a code, m width of the predictor, K codes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Attention(nn.Module):
    """Multi-head attention of queries (B, Q, m) to a context (B, S, m), both normed by the caller."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, Q, m), (B, S, m) -> (B, Q, m)."""
        q, (k, v) = self._split(self.q(x)), (self._split(part) for part in self.kv(context).chunk(2, -1))
        mixed: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return mixed

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)  # (B, heads, S, m / heads)


class Block(nn.Module):
    """Self-attention and a feed-forward layer of four times the width, each behind a norm and beside a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, U, m) -> (B, U, m)."""
        seen = self.norm(x)
        x = x + self.attention(seen, seen)
        changed: Tensor = x + self.mlp(x)
        return changed


class Perceiver(nn.Module):
    """Embeddings of the shown codes and one condition token -> logits of the hidden ones.

    ``vectors`` (K, d_q) is the frozen codebook, kept as a buffer. A hidden position's own embedding is never gathered,
    so nothing about it can leak. ``width`` m over ``heads`` heads, ``layers`` blocks on the latents.
    """

    def __init__(
        self,
        vectors: Tensor,
        grid: tuple[int, int],
        *,
        width: int = 1024,
        heads: int = 16,
        layers: int = 6,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} heads don't divide a width of {width}")
        self.vectors: Tensor
        self.register_buffer("vectors", vectors.detach().clone().float())
        self.grid, self.checkpointing = grid, checkpointing
        self.embedder = nn.Linear(vectors.shape[1], width)
        self.rows = nn.Parameter(0.02 * torch.randn(grid[0], 1, width))
        self.columns = nn.Parameter(0.02 * torch.randn(1, grid[1], width))
        self.mask_token = nn.Parameter(0.02 * torch.randn(width))
        self.query_norm, self.context_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.listen = Attention(width, heads)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.hidden_norm, self.latent_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.decode = Attention(width, heads)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vectors.shape[0]))

    def embed(self, indices: Tensor) -> Tensor:
        """Indices (B, L) -> the codebook's embeddings (B, L, d_q)."""
        return self.vectors[indices]

    def positions(self) -> Tensor:
        """(L, m), a learnt vector per row plus one per column, row-major."""
        return (self.rows + self.columns).flatten(0, 1)

    def forward(self, embeddings: Tensor, shown: Tensor, hidden: Tensor, told: Tensor) -> Tensor:
        """Embeddings (B, L, d_q), positions shown (B, U) and hidden (B, M), condition (B, m) -> logits (B, M, K)."""
        places = self.positions()
        seen = embeddings.gather(1, shown[..., None].expand(-1, -1, embeddings.shape[-1]))  # (B, U, d_q)
        tokens = self.embedder(seen) + places[shown]
        context = self.context_norm(torch.cat([tokens, told[:, None]], 1))  # (B, U + 1, m)
        latents = tokens + self.listen(self.query_norm(tokens), context)
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                latents = checkpoint(block, latents, use_reentrant=False)
            else:
                latents = block(latents)
        asked = self.mask_token + places[hidden]  # (B, M, m)
        logits: Tensor = self.head(asked + self.decode(self.hidden_norm(asked), self.latent_norm(latents)))
        return logits
