"""SAM's attention without its bias matrix: decomposed relative positions as extra columns of queries and keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def relative_table(table: Tensor, side: int) -> Tensor:
    """Relative positions (2 * native - 1, d) -> (side, side, d): entry i, j is the one of query i and key j.

    A table of another side is resized linearly, as SAM does.
    """
    length = 2 * side - 1
    if len(table) != length:
        table = F.interpolate(table.t()[None], size=length, mode="linear")[0].t()
    at = torch.arange(side, device=table.device)
    return table[at[:, None] - at[None, :] + side - 1]


def lean_attention(attn: Any, x: Tensor) -> Tensor:
    """transformers' ``SamVisionAttention`` on (B, h, w, W) -> (B, h, w, W), with the memory of one feature map.

    The score of query (i, j) and key (k, l) is scale * q.k + q.Rh[i, k] + q.Rw[j, l]. With Q = [scale * q, q.Rh, q.Rw]
    and K = [k, onehot(row), onehot(column)] it is Q.K, so any fused kernel computes it and the (h*w)^2 bias of every
    head, 805 MB per image of 1024 pixels and global block of ViT-B in fp32, is never built. Values are padded with
    zeros to the width of Q: fused kernels want equal widths. Equal to the original up to rounding.
    """
    b, h, w, _ = x.shape
    heads = attn.num_attention_heads
    q, k, v = attn.qkv(x).reshape(b, h * w, 3, heads, -1).permute(2, 0, 3, 1, 4)  # each (B, heads, h*w, d)
    d = q.shape[-1]
    if attn.use_rel_pos:
        grid = q.unflatten(2, (h, w))
        rows = torch.einsum("bnhwd,hkd->bnhwk", grid, relative_table(attn.rel_pos_h, h).to(q.dtype)).flatten(2, 3)
        columns = torch.einsum("bnhwd,wkd->bnhwk", grid, relative_table(attn.rel_pos_w, w).to(q.dtype)).flatten(2, 3)
        q = torch.cat([q * attn.scale, rows, columns], -1)
        k = torch.cat([k, _places(h, w, k).expand(b, heads, -1, -1)], -1)
        v = F.pad(v, (0, h + w))
    else:
        q = q * attn.scale
    dropout = attn.dropout if attn.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, scale=1.0, dropout_p=dropout)[..., :d]
    return attn.proj(out.transpose(1, 2).reshape(b, h, w, -1))  # type: ignore[no-any-return]


def _places(h: int, w: int, like: Tensor) -> Tensor:
    """(h*w, h + w): a one for the row and a one for the column of every token, row-major."""
    rows = torch.eye(h, dtype=like.dtype, device=like.device).repeat_interleave(w, 0)
    columns = torch.eye(w, dtype=like.dtype, device=like.device).repeat(h, 1)
    return torch.cat([rows, columns], -1)


def windowed(x: Tensor, size: int) -> tuple[Tensor, tuple[int, int]]:
    """(B, h, w, W) -> windows (B * n, size, size, W) and the padded (h', w'); zeros fill the last ones, unmasked."""
    b, h, w, c = x.shape
    x = F.pad(x, (0, 0, 0, -w % size, 0, -h % size))
    padded = (x.shape[1], x.shape[2])
    x = x.reshape(b, padded[0] // size, size, padded[1] // size, size, c).transpose(2, 3)
    return x.reshape(-1, size, size, c), padded


def unwindowed(windows: Tensor, padded: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The reverse: windows and the padded (h', w') -> (B, h, w, W)."""
    size = windows.shape[1]
    rows, columns = padded[0] // size, padded[1] // size
    x = windows.reshape(-1, rows, columns, size, size, windows.shape[-1]).transpose(2, 3)
    return x.reshape(-1, *padded, windows.shape[-1])[:, : grid[0], : grid[1]]


def block(layer: Any, x: Tensor, *, lean: bool = True) -> Tensor:
    """transformers' ``SamVisionLayer`` on (B, h, w, W) -> (B, h, w, W) of any grid.

    ``lean`` False runs the layer's own attention, bias matrix and all.
    """
    grid, y = (x.shape[1], x.shape[2]), layer.layer_norm1(x)
    padded = grid
    if layer.window_size > 0:
        y, padded = windowed(y, layer.window_size)
    y = lean_attention(layer.attn, y) if lean else layer.attn(y)[0]
    if layer.window_size > 0:
        y = unwindowed(y, padded, grid)
    x = x + y
    return x + layer.mlp(layer.layer_norm2(x))  # type: ignore[no-any-return]
