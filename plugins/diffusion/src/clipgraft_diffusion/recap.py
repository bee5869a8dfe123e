"""DIVA's visual dense recap: the class token and some local tokens of one image, in the joint space.

Registered as the head ``diffusion/recap``. Which recap a backbone takes is a choice of the paper (official code,
``condition/*.py``), here settings: OpenAI draws 76 patches per image with replacement, MetaCLIP and DFN at 224 px take
all, DFN at 378 px draws half as many as there are, SigLIP averages windows of patches in raster order.

Density: the code draws 76 of 256 (29.7 %) and 76 of 576 (13.2 %); a summary by others gives the paper's as 15 and 30 %,
which is unchecked. The presets follow the code; ``k`` and ``ratio`` set anything else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft.config.schema import Config
from clipgraft.encoders.base import ImageEncoder
from clipgraft.errors import InputError
from clipgraft.types import ImageFeatures

Kind = Literal["cls", "random", "all", "average"]
Project = Callable[[Tensor], Tensor]


class RecapConfig(Config):
    """Settings of the head ``diffusion/recap``."""

    kind: Kind = Field("all", description="local tokens beside the global one: none (cls), drawn, all, or averaged")
    k: int | None = Field(None, gt=0, description="for random: how many are drawn")
    ratio: float | None = Field(None, gt=0, le=1, description="for random: that share of the patches, rounded down")
    window: int | None = Field(None, gt=0, description="for average: tokens per window, in raster order")
    replacement: bool = Field(True, description="for random: a patch may be drawn twice, as in the official code")

    @model_validator(mode="after")
    def _fits_the_kind(self) -> RecapConfig:
        if (self.kind == "random") != ((self.k is None) != (self.ratio is None)) or (self.k and self.ratio):
            raise ValueError("kind random takes either k or ratio, the other kinds take neither")
        if (self.kind == "average") != (self.window is not None):
            raise ValueError("kind average takes window, the other kinds take none")
        return self

    def build(self) -> Recap:
        """The module."""
        return Recap(kind=self.kind, k=self.k, ratio=self.ratio, window=self.window, replacement=self.replacement)


class Recap(nn.Module):
    """Image features with tokens -> (B, 1 + K, D): the global embedding, then K local tokens.

    It holds no weights. ``k``, ``ratio`` and ``replacement`` belong to kind "random", ``window`` to "average".
    """

    def __init__(
        self,
        *,
        kind: Kind = "all",
        k: int | None = None,
        ratio: float | None = None,
        window: int | None = None,
        replacement: bool = True,
    ) -> None:
        super().__init__()
        self.kind, self.k, self.ratio, self.window, self.replacement = kind, k, ratio, window, replacement

    def count(self, patches: int) -> int:
        """K for a tower of ``patches`` patch tokens; raises when they don't suffice."""
        if self.kind == "cls":
            return 0
        if self.kind == "all":
            return patches
        if self.kind == "average":
            found, wish = patches // (self.window or 1), f"recap.window {self.window}"
        else:
            found = self.k if self.k is not None else int((self.ratio or 0) * patches)
            wish = f"recap.k {self.k}" if self.k is not None else f"recap.ratio {self.ratio}"
            found = 0 if found > patches and not self.replacement else found
        if not found:
            raise InputError(f"{wish} doesn't suit a tower of {patches} patch tokens; set recap.kind to all")
        return found

    def projection(self, image: ImageEncoder) -> Project:
        """``project`` as ``image`` itself reads local tokens."""
        return local_projection(image)

    def forward(
        self, features: ImageFeatures, *, project: Project | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Features of a tower -> (B, 1 + K, D) in fp32 or the tower's dtype, not normalised.

        ``project`` maps local tokens (B, K, W) into the joint space (``local_projection`` of the tower); without it W
        must be D. Patches are drawn anew in every call, from ``generator`` or the global state, for each image its own.
        """
        pooled = features.pooled[:, None]
        if self.kind == "cls":
            return pooled
        if features.tokens is None:
            raise ValueError("a recap with local tokens needs them; ask the tower with FeatureRequest(tokens=True)")
        local = self._chosen(features.tokens, generator)
        local = local if project is None else project(local)
        if local.shape[-1] != pooled.shape[-1]:
            raise InputError(
                f"local tokens of width {local.shape[-1]} beside a global one of {pooled.shape[-1]}: this tower has no "
                "projection that fits both; set recap.kind to cls"
            )
        return torch.cat([pooled, local.to(pooled.dtype)], 1)

    def _chosen(self, tokens: Tensor, generator: torch.Generator | None) -> Tensor:
        """(B, N, W) -> (B, K, W)."""
        size, patches, width = tokens.shape
        k = self.count(patches)
        if self.kind == "all":
            return tokens
        if self.kind == "average":  # windows run through the raster and ignore rows; the tail is dropped, as official
            return F.avg_pool1d(tokens.transpose(1, 2), self.window or 1).transpose(1, 2)
        device = "cpu" if generator is None else generator.device  # the official code draws on the CPU
        if self.replacement:
            rows = torch.randint(0, patches, (size, k), generator=generator, device=device)
        else:
            rows = torch.rand(size, patches, generator=generator, device=device).argsort(1)[:, :k]
        return tokens.gather(1, rows.to(tokens.device)[..., None].expand(-1, -1, width))


def local_projection(image: ImageEncoder) -> Project:
    """How a tower's own projection reads its local tokens: ``proj`` of a ViT, the head of a timm tower.

    Looked up at every call, so that a trained or adapted projection is the one in use. Tokens come after the tower's
    last norm. SigLIP's towers have no projection: their tokens stay as they are.
    """

    def project(tokens: Tensor) -> Tensor:
        tower: object = getattr(image, "tower", None)
        weight, head = getattr(tower, "proj", None), getattr(tower, "head", None)
        if isinstance(weight, Tensor):
            return tokens @ weight
        result: Tensor = head(tokens) if isinstance(head, nn.Module) else tokens
        return result

    return project
