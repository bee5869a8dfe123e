"""Blocks of an open_clip ViT with other attention: the parts of the old block under their old names, and what is new.

An open_clip checkpoint is what is left when the new names are taken away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft_video.clock import Clock

PARTS = ("ln_1", "attn", "ls_1", "ln_2", "mlp", "ls_2")


class FrameBlock(nn.Module):
    """A residual block (BT, L, W) -> (BT, L, W) made of another one's parts."""

    def __init__(self, block: Any, clock: Clock) -> None:
        super().__init__()
        for name in PARTS:
            setattr(self, name, getattr(block, name))
        self.clock = clock
        self.width, self.heads = self.attn.embed_dim, self.attn.num_heads

    def forward(
        self, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        """As open_clip calls a block of an image tower: without a mask."""
        if attn_mask is not None or k_x is not None:
            raise InputError("frames are mixed in an image tower's plain attention, this one has masks or other keys")
        return self.mix(q_x)

    def mix(self, x: Tensor) -> Tensor:
        """The block itself."""
        raise NotImplementedError

    def attend(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Normalised queries (N, L, W) and keys (N, M, W) through the block's own attention -> (N, L, W)."""
        return self.attn(queries, keys, keys, need_weights=False)[0]  # type: ignore[no-any-return]

    def feed_forward(self, x: Tensor) -> Tensor:
        """x + MLP(LN2 x)."""
        return x + self.ls_2(self.mlp(self.ln_2(x)))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised (N, L, W) -> queries, keys, values (N, L, W) of the block's attention."""
        q, k, v = F.linear(x, self.attn.in_proj_weight, self.attn.in_proj_bias).chunk(3, -1)
        return q, k, v

    def scores(self, q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None) -> Tensor:
        """Projected q (N, L, W), k, v (N, M, W) -> (N, L, W) after the output projection; ``bias`` (N, 1, 1, M)."""
        split = [x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v)]
        out = F.scaled_dot_product_attention(*split, attn_mask=bias)
        return self.attn.out_proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def plain_blocks(blocks: Iterable[Any], *, what: str, uri: str) -> None:
    """``InputError`` unless all are open_clip's own: what another graft added to a block would be lost."""
    if any(isinstance(block, FrameBlock) or not hasattr(block, name) for block in blocks for name in PARTS):
        raise InputError(f"{what} needs open_clip's plain residual blocks; {uri} has others")


def plain_tower(encoder: Encoder, *, what: str) -> None:
    """``InputError`` unless the image tower is an open_clip ViT whose blocks are as they were."""
    from clipgraft.encoders.towers import VitImage
    from clipgraft_video.model import CLOCK

    if not isinstance(encoder.image, VitImage):
        raise InputError(f"{what} needs an open_clip ViT as image tower, {encoder.data.origin.uri} has another kind")
    if getattr(encoder.image, CLOCK, None) is not None:
        raise InputError(f"{what}: the tower mixes frames already; graft one way of doing so onto a plain CLIP")
    plain_blocks(encoder.image.tower.transformer.resblocks, what=what, uri=encoder.data.origin.uri)


def replace_blocks(encoder: Encoder, make: Callable[[int, Any, Clock], nn.Module], *, what: str) -> Clock:
    """Put ``make(index, block, clock)`` in the place of every block of an open_clip ViT; returns the shared clock."""
    from clipgraft_video.model import CLOCK

    plain_tower(encoder, what=what)
    blocks: Any = encoder.image.tower.transformer.resblocks  # type: ignore[union-attr]
    clock = Clock()
    for index, block in enumerate(blocks):
        blocks[index] = make(index, block, clock)
    setattr(encoder.image, CLOCK, clock)
    return clock


def new_parameters(module: nn.Module, of: type[nn.Module]) -> list[nn.Parameter]:
    """Parameters of blocks of the kind ``of`` that are not the old block's."""
    return [
        p
        for block in module.modules()
        if isinstance(block, of)
        for name, p in block.named_parameters()
        if name.partition(".")[0] not in PARTS
    ]


def resample(positions: Tensor, frames: int) -> Tensor:
    """(T, W) learnt per frame -> (``frames``, W), linear; unchanged where the number is the same."""
    if len(positions) == frames:
        return positions
    return F.interpolate(positions.T[None], size=frames, mode="linear", align_corners=False)[0].T
