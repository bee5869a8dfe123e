"""What the generator is told about an image: CLIP's global embedding, and nothing else.

Registered as the head ``diffusion/global-token``.

Shape legend of this package: B batch, D joint embedding, H x W' pixels, N latent tokens of C channels on a grid h x w,
V width of the pooled condition, T width of the condition token.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field
from torch import Tensor, nn

from clipgraft.config.schema import Config


@dataclass(frozen=True, slots=True)
class Condition:
    """``vec`` (B, V) modulates every block, ``txt`` (B, 1, T) is one more token of the joint attention."""

    vec: Tensor
    txt: Tensor

    def rolled(self, by: int = 1) -> Condition:
        """The same conditions, each given to another sample of the batch."""
        return Condition(self.vec.roll(by, 0), self.txt.roll(by, 0))


def projector(width: int, out: int) -> nn.Sequential:
    """LayerNorm -> Linear -> GELU -> Linear, (B, width) -> (B, out)."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))


class GlobalTokenConfig(Config):
    """Settings of the head ``diffusion/global-token``."""

    embed_dim: int = Field(gt=0, description="width D of the embedding")
    vec_dim: int = Field(768, gt=0, description="pooled condition, modulates every block")
    txt_dim: int = Field(4096, gt=0, description="condition token of the joint attention")


class GlobalCondition(nn.Module):
    """Two independent projectors of the un-normalised embedding z (B, D).

    The paper describes the modulation alone; its code also feeds the embedding as a token, as here (official code,
    ``CLIP_bank.py``). Local tokens stay out on purpose: 10 % of them already cost most of the gain (paper, ablation).
    """

    def __init__(self, embed_dim: int, *, vec_dim: int = 768, txt_dim: int = 4096) -> None:
        super().__init__()
        self.vec = projector(embed_dim, vec_dim)
        self.txt = projector(embed_dim, txt_dim)

    def forward(self, z: Tensor) -> Condition:
        """z (B, D), not normalised -> condition."""
        return Condition(vec=self.vec(z), txt=self.txt(z)[:, None])
