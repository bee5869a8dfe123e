"""Patch embeddings in the joint space, of any image tower that has patches, at any size that it can be given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clipgraft.encoders.base import ImageEncoder
from clipgraft.encoders.towers import ResNetImage, TimmImage, VitImage
from clipgraft.errors import InputError
from clipgraft.types import FeatureRequest
from clipgraft_merging.samclip.image import SamImage

Path = Literal["last", "value"]


@dataclass(frozen=True, slots=True)
class Patches:
    """``embeddings`` (B, N, D), not normalised, row-major on ``grid`` (h, w)."""

    embeddings: Tensor
    grid: tuple[int, int]

    def map(self) -> Tensor:
        """(B, D, h, w)."""
        return self.embeddings.transpose(1, 2).unflatten(2, self.grid)


def patch_embeddings(image: ImageEncoder, pixels: Tensor, *, path: Path = "last") -> Patches:
    """Standardised pixels (B, 3, H, W') -> every patch in the joint space.

    ``last``: the tower's last tokens through its last norm and its projection, as its pooled token goes. ``value``
    (MaskCLIP, Zhou et al., arXiv 2112.01071): the last block's attention is replaced by its value path, so that a patch
    says what is there and not what it looked at; its residual and feed-forward parts stay. A tower that pools by
    attention has only this one. A tower of SAM-CLIP has a head for patches, and no other path.
    """
    if problem := why_no_patches(image, path=path):
        raise InputError(problem)
    if isinstance(image, SamImage):
        found = image(pixels, FeatureRequest(tokens=True))
        return Patches(found.tokens, found.grid)
    if isinstance(image, VitImage):
        return _vit(image, pixels, path)
    if isinstance(image, ResNetImage):
        x, pool = image(pixels, FeatureRequest(tokens=True)), image.tower.attnpool
        values = F.linear(x.tokens, pool.v_proj.weight, pool.v_proj.bias)
        return Patches(F.linear(values, pool.c_proj.weight, pool.c_proj.bias), x.grid)
    return _timm(image, pixels)


def step_of(image: ImageEncoder) -> int | None:
    """Side of the cells to which heights and widths must be multiples [pixels]; None: only the native size will do."""
    if isinstance(image, SamImage):
        return image.sam.patch
    if isinstance(image, VitImage):
        h, w = image.tower.patch_size
        return int(h) if h == w else None
    return None


def why_no_patches(image: ImageEncoder, *, path: Path = "last") -> str:
    """Why this tower's patches can't be compared with texts; empty when they can."""
    kind = type(getattr(image, "tower", image)).__name__
    if isinstance(image, SamImage):
        return "" if path == "last" else "a SAM-CLIP's patches have a head of their own; set dense to last"
    if isinstance(image, ResNetImage):
        return (
            ""
            if path == "value"
            else "a ResNet pools by attention, its positions have no last path; set dense to value"
        )
    if isinstance(image, VitImage):
        tower = image.tower
        if tower.attn_pool is not None:
            return "this ViT pools with a block of its own (CoCa); segmentation needs patches that share its projection"
        plain = all(hasattr(tower.transformer.resblocks[-1], name) for name in ("ln_1", "attn", "ls_1", "mlp"))
        usual = plain and getattr(tower.transformer.resblocks[-1].attn, "in_proj_weight", None) is not None
        return "" if path == "last" or usual else "the value path needs plain multi-head attention; set dense to last"
    if isinstance(image, TimmImage) and image.grid is not None:
        pool = getattr(image.tower.trunk, "global_pool", "")
        if pool == "map":
            return ""
        return "" if path == "last" else f"this timm tower pools by {pool or 'its own way'}; set dense to last"
    return f"this image tower ({kind}) has no patches to compare with texts; use a ViT, a ResNet or a SAM-CLIP"


def _vit(image: VitImage, pixels: Tensor, path: Path) -> Patches:
    """open_clip's ViT at any multiple of its patch; positions are resized bicubically (exact at the native size)."""
    tower = image.tower
    h, w = (int(side) for side in tower.patch_size)
    height, width = pixels.shape[-2:]
    if height % h or width % w:
        raise InputError(f"pixels of {height} x {width} don't divide into patches of {h} x {w}; choose a multiple")
    grid = (height // h, width // w)
    x = tower.conv1(pixels).flatten(2).transpose(1, 2)
    x = torch.cat([tower.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], 1)
    x = tower.ln_pre(x + _positions(tower, grid).to(x.dtype))
    *blocks, last = tower.transformer.resblocks
    for block in blocks:
        x = block(x)
    x = last(x) if path == "last" else _value_path(last, x)
    x = tower.ln_post(x)[:, 1:]
    return Patches(x if tower.proj is None else x @ tower.proj, grid)


def _positions(tower: Any, grid: tuple[int, int]) -> Tensor:
    """(1 + N, W)."""
    stored: Tensor = tower.positional_embedding
    if tuple(tower.grid_size) == grid:
        return stored
    cells = stored[1:].T.reshape(1, -1, *tower.grid_size).float()
    cells = F.interpolate(cells, size=grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([stored[:1], cells.flatten(2)[0].T.to(stored.dtype)])


def _value_path(block: Any, x: Tensor) -> Tensor:
    """One block on (B, M, W) whose attention is its value projection and its output projection."""
    attention, width = block.attn, x.shape[-1]
    bias = None if attention.in_proj_bias is None else attention.in_proj_bias[2 * width :]
    values = F.linear(block.ln_1(x), attention.in_proj_weight[2 * width :], bias)
    x = x + block.ls_1(attention.out_proj(values))
    return x + block.ls_2(block.mlp(block.ln_2(x)))  # type: ignore[no-any-return]


def _timm(image: TimmImage, pixels: Tensor) -> Patches:
    """Every token pooled alone: exact for average pooling, the value path for attention pooling (SigLIP)."""
    found, trunk = image(pixels, FeatureRequest(tokens=True)), image.tower.trunk
    assert found.tokens is not None and found.grid is not None  # why_no_patches has looked
    alone = found.tokens.reshape(-1, 1, found.tokens.shape[-1])
    if getattr(trunk, "global_pool", "") == "avg":  # it leaves prefix tokens out before it averages
        prefix = alone.new_zeros(len(alone), getattr(trunk, "num_prefix_tokens", 0), alone.shape[-1])
        alone = torch.cat([prefix, alone], 1)
    joint = image.tower.head(trunk.forward_head(alone))
    return Patches(joint.unflatten(0, (len(found.tokens), -1)), found.grid)
