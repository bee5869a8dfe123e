"""``merging/fusion``: the trainable fusion of two towers, in front of what reads their tokens.

Jiang et al., From CLIP to DINO: Visual Encoders Shout in Multi-modal Large Language Models (COMM), arXiv 2310.08825.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn

from clipgraft.config.schema import Config
from clipgraft.errors import InputError
from clipgraft.types import ImageFeatures
from clipgraft_merging.fusion.mixture_of_features import FeatureFusion, Mode, MultiLevelMerge, Normalise, resized


class FusionConfig(Config):
    """Settings of the head ``merging/fusion``."""

    widths: tuple[int, int] = Field(description="token widths of the first and the second tower")
    mode: Mode = Field("concat", description="add, interleave tokens, or concat channels")
    share: float = Field(0.5, ge=0, le=1, description="for add: of the first tower")
    norm: bool = Field(False, description="a LayerNorm without weights per tower before they meet")
    width: int | None = Field(None, gt=0, description="map each tower to this width before they meet")
    layers: tuple[int, ...] = Field((), description="blocks of the first tower to merge; none: its last tokens")
    second_layers: tuple[int, ...] = Field((), description="blocks of the second tower to merge")
    normalise: Normalise = Field("softmax", description="of the blocks' weights: softmax, or none")
    mlp_ratio: float | None = Field(None, gt=0, description="hidden width of an MLP over the second tower, in widths")
    out: int | None = Field(None, gt=0, description="width of a last linear map, such as a language model's")


class Fusion(nn.Module):
    """Levels merged, an MLP over the second tower, both fused, mapped to ``out``. ``width`` is the result's."""

    def __init__(
        self,
        *,
        widths: tuple[int, int],
        mode: Mode = "concat",
        share: float = 0.5,
        norm: bool = False,
        width: int | None = None,
        layers: tuple[int, ...] = (),
        second_layers: tuple[int, ...] = (),
        normalise: Normalise = "softmax",
        mlp_ratio: float | None = None,
        out: int | None = None,
    ) -> None:
        super().__init__()
        self.levels, self.second_levels = (
            MultiLevelMerge(chosen, w, normalise=normalise) if chosen else None
            for chosen, w in zip((layers, second_layers), widths, strict=True)
        )
        hidden = None if mlp_ratio is None else round(widths[1] * mlp_ratio)
        self.mlp = (
            nn.Identity()
            if hidden is None
            else nn.Sequential(nn.Linear(widths[1], hidden), nn.GELU(), nn.Linear(hidden, widths[1]))
        )
        self.fusion = FeatureFusion(widths, mode=mode, share=share, norm=norm, width=width)
        self.last = nn.Identity() if out is None else nn.Linear(self.fusion.width, out)
        self.width = out or self.fusion.width

    def forward(self, first: ImageFeatures, second: ImageFeatures) -> Tensor:
        """Features of both towers with the tokens or layers that this reads -> (B, N, D), or (B, 2N, D) interleaved."""
        a, b = _level(first, self.levels), _level(second, self.second_levels)
        if first.grid is None or second.grid is None:
            raise InputError("features without a grid can't be fused; ask for FeatureRequest(tokens=True)")
        fused: Tensor = self.last(self.fusion(a, self.mlp(resized(b, second.grid, first.grid))))
        return fused


def _level(features: ImageFeatures, levels: MultiLevelMerge | None) -> Tensor:
    if levels is not None:
        return levels(features.layers)  # type: ignore[no-any-return]
    if features.tokens is None:
        raise InputError("no patch tokens here; ask for FeatureRequest(tokens=True)")
    return features.tokens
