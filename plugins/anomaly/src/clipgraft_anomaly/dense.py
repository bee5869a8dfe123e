"""What a ViT says about every patch: the ordinary path, and AnomalyCLIP's local path of value attention beside it.

Shape legend of this package: B images, N = h x w patch tokens, W tower width, D joint embedding, S side of the input in
pixels, P prompts, L text length, V text width. Layers are numbered from 1, as papers do.

No module is patched: the local path is computed from the blocks' own weights while the ordinary one runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft.encoders.base import ImageEncoder
from clipgraft.encoders.towers import VitImage
from clipgraft.errors import InputError

Resampling = Literal["bilinear", "bicubic"]


@dataclass(frozen=True, slots=True)
class Dense:
    """``cls`` (B, W): the class token after the last block, before ``ln_post``; ``local`` {layer: (B, N, W)} likewise,

    without the class token; ``grid`` (h, w) with h * w == N.
    """

    cls: Tensor
    local: dict[int, Tensor]
    grid: tuple[int, int]


class DenseTower(nn.Module):
    """An open_clip ViT at any input size that its patches divide; refuses towers that it can't read.

    ``vv_start`` is the first layer (from 1) of the local path x_l = x_{l-1} + VV_l(LN1_l(h_{l-1})), which reads the
    ordinary stream h and is never fed back: x_l = h_{vv_start-1} + the sum of VV_j up to l. Layers before it, and all
    of them when it is None, give h_l. VV is the block's attention with query = key = value: the V rows of its input
    projection, its scale and its output projection (AnomalyCLIP, official code, ``DPAM``).
    """

    def __init__(self, image: ImageEncoder, *, size: int | None = None, resampling: Resampling = "bilinear") -> None:
        super().__init__()
        problem = why_not_dense(image)
        if problem:
            raise InputError(problem)
        self.image: ImageEncoder = image
        self.resampling = resampling
        patch: tuple[int, int] = self.tower.patch_size
        self.size = int(self.tower.image_size[0]) if size is None else size
        if self.size % patch[0] or self.size % patch[1]:
            near = max(1, round(self.size / patch[0])) * patch[0]
            raise InputError(f"size {self.size} is no multiple of the tower's patch of {patch[0]} px; use {near}")
        self.grid: tuple[int, int] = (self.size // patch[0], self.size // patch[1])

    @property
    def tower(self) -> Any:
        """open_clip's ``VisionTransformer``."""
        return self.image.tower

    @property
    def width(self) -> int:
        """W."""
        return self.image.width

    @property
    def depth(self) -> int:
        """Number of layers."""
        return self.image.depth

    def layer_problem(self, layers: Sequence[int], vv_start: int | None) -> str:
        """What is wrong with these numbers for this tower; empty when nothing is."""
        for layer in layers:
            if not 1 <= layer <= self.depth:
                return f"layer {layer} was asked of a tower of {self.depth} layers; use 1 to {self.depth}"
        if vv_start is not None and not 1 <= vv_start <= self.depth:
            return f"vv_start {vv_start} is outside the tower's layers; use 1 to {self.depth}, or null for none"
        return ""

    def forward(self, pixels: Tensor, *, layers: Sequence[int], vv_start: int | None = None) -> Dense:
        """Standardised pixels (B, 3, S, S) -> features; nothing is projected."""
        if tuple(pixels.shape[-2:]) != (self.size, self.size):
            raise InputError(f"got pixels of {tuple(pixels.shape[-2:])}, this detector takes {self.size} x {self.size}")
        if problem := self.layer_problem(layers, vv_start):
            raise InputError(problem)
        h, local = self.embed(pixels), None
        found: dict[int, Tensor] = {}
        last = max(layers, default=0)
        for layer, block in enumerate(self.tower.transformer.resblocks, start=1):
            values = vv_start is not None and vv_start <= layer <= last
            before, (h, own) = h, through(block, h, values=values, cls_only=layer == self.depth and values)
            if own is not None:
                local = (before if local is None else local) + own
            if layer in layers:
                found[layer] = (h if local is None else local)[:, 1:]
        return Dense(h[:, 0], found, self.grid)

    def embed(self, pixels: Tensor) -> Tensor:
        """Standardised pixels (B, 3, S, S) -> (B, 1 + N, W), the input of the first block."""
        tower = self.tower
        x = tower.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([tower.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1), x], 1)
        embedded: Tensor = tower.ln_pre(x + self.positions().to(x.dtype))
        return embedded

    def positions(self) -> Tensor:
        """(1 + N, W): the tower's position embeddings for this size, always from the original grid."""
        whole: Tensor = self.tower.positional_embedding
        old = tuple(self.tower.grid_size)
        if old == self.grid:
            return whole
        grid = whole[1:].T.reshape(1, -1, *old).float()
        sharp = self.resampling == "bicubic"
        grid = F.interpolate(grid, self.grid, mode=self.resampling, align_corners=False, antialias=sharp)
        return torch.cat([whole[:1], grid.flatten(2)[0].T.to(whole.dtype)])

    def project(self, x: Tensor, *, ln_post: bool = True) -> Tensor:
        """(..., W) -> (..., D): the tower's last norm, unless told not to, and its projection."""
        x = self.tower.ln_post(x) if ln_post else x
        return x if self.tower.proj is None else x @ self.tower.proj


def through(block: Any, h: Tensor, *, values: bool, cls_only: bool) -> tuple[Tensor, Tensor | None]:
    """One block on (B, M, W): its output, and with ``values`` what its value attention adds to the local path.

    Both attentions are fused and share one projection; the second is ``value_attention``'s. ``cls_only`` gives the
    output (B, 1, W) of the class token alone, for the last block when nothing reads its patches.
    """
    y, heads = block.ln_1(h), block.attn.num_heads
    q, k, v = (
        part.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, heads, M, W / heads)
        for part in F.linear(y, block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, -1)
    )

    def mixed(query: Tensor, key: Tensor) -> Tensor:
        seen = F.scaled_dot_product_attention(query, key, v).transpose(1, 2).flatten(2)
        out: Tensor = block.ls_1(block.attn.out_proj(seen))
        return out

    own = mixed(v, v) if values else None
    h, q = (h[:, :1], q[:, :, :1]) if cls_only else (h, q)
    h = h + mixed(q, k)
    return h + block.ls_2(block.mlp(block.ln_2(h))), own


def value_attention(block: Any, x: Tensor) -> Tensor:
    """Attention of a block with query = key = value over (B, M, W), without the block's layer scale."""
    attention, width = block.attn, x.shape[-1]
    bias = None if attention.in_proj_bias is None else attention.in_proj_bias[2 * width :]
    v = F.linear(x, attention.in_proj_weight[2 * width :], bias)
    v = v.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)  # (B, heads, M, W / heads)
    out: Tensor = attention.out_proj(F.scaled_dot_product_attention(v, v, v).transpose(1, 2).flatten(2))
    return out


def why_not_dense(image: ImageEncoder) -> str:
    """Why a tower's patches can't be read; empty when they can."""
    if not isinstance(image, VitImage):
        return (
            f"this image tower is a {type(getattr(image, 'tower', image)).__name__}; inspection reads the attention "
            "of open_clip's own ViT, so choose a ViT that is no timm or ResNet model (SigLIP's are timm)"
        )
    tower = image.tower
    if tower.pool_type != "tok" or tower.attn_pool is not None:
        return "this ViT pools by averaging or attention; inspection needs one with a class token (pool_type tok)"
    other = [b for b in tower.transformer.resblocks if type(b) is not ResidualAttentionBlock]
    if other or any(type(b.attn) is not nn.MultiheadAttention for b in tower.transformer.resblocks):
        kind = type(other[0]).__name__ if other else "another attention class"
        return f"this ViT has blocks with {kind}; inspection needs plain multi-head attention"
    if not tower.transformer.batch_first:
        return "this ViT runs tokens first; load it with open_clip 3 or later"
    return ""
