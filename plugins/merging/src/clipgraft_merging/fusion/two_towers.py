"""``merging/two-towers``: CLIP's embedding, with patch tokens that a second tower has a share in."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from clipgraft.config.schema import Config
from clipgraft.encoders.base import DEFAULT_REQUEST, ImageEncoder, Preprocess
from clipgraft.errors import InputError
from clipgraft.types import FeatureRequest, ImageFeatures
from clipgraft_merging.fusion.mixture_of_features import FeatureFusion, Mode, MultiLevelMerge, resized
from clipgraft_merging.fusion.second_tower import SecondTower, open_second

if TYPE_CHECKING:
    from clipgraft.encoders.base import Encoder


class TwoTowersImage(ImageEncoder):
    """Pooled embedding, class token and layers are the first tower's; tokens are fused when they are asked for."""

    def __init__(
        self,
        image: ImageEncoder,
        second: SecondTower,
        fusion: FeatureFusion,
        *,
        preprocess: Preprocess,
        levels: MultiLevelMerge | None = None,
        second_levels: MultiLevelMerge | None = None,
    ) -> None:
        super().__init__()
        assert image.grid is not None
        self.image, self.second, self.fusion = image, second, fusion
        self.levels, self.second_levels, self._preprocess = levels, second_levels, preprocess
        self.width, self.embed_dim, self.depth = fusion.width, image.embed_dim, image.depth

    @property
    def grid(self) -> tuple[int, int]:  # type: ignore[override]
        """(h, w) of the fused tokens."""
        assert self.image.grid is not None
        return self.fusion.grid(self.image.grid)

    def forward(self, pixels: Tensor, want: FeatureRequest = DEFAULT_REQUEST) -> ImageFeatures:
        """Standardised pixels (B, 3, H, W') -> features; the second tower sees the same picture in its own way."""
        if not want.tokens:
            return self.image(pixels, want)  # type: ignore[no-any-return]
        asked = () if self.levels is None else self.levels.layers
        first = self.image(pixels, FeatureRequest(tokens=True, layers=tuple(dict.fromkeys((*want.layers, *asked)))))
        if first.grid is None:
            raise InputError("the first tower left out patch tokens (patch dropout); use eval mode")
        also = () if self.second_levels is None else self.second_levels.layers
        second = self.second(self._undone(pixels), FeatureRequest(tokens=True, layers=also))
        a = first.tokens if self.levels is None else self.levels(first.layers)
        b = second.tokens if self.second_levels is None else self.second_levels(second.layers)
        tokens = self.fusion(a, resized(b, second.grid, first.grid))
        layers = {i: first.layers[i] for i in want.layers}
        return ImageFeatures(first.pooled, tokens=tokens, cls=first.cls, grid=self.grid, layers=layers)

    def _undone(self, pixels: Tensor) -> Tensor:
        """Standardised -> [0, 1]."""
        told = self._preprocess.mean, self._preprocess.std
        mean, std = (torch.tensor(v, dtype=pixels.dtype, device=pixels.device)[:, None, None] for v in told)
        return pixels * std + mean


class TwoTowers(Config):
    """A second, frozen image tower beside CLIP's; what asks for patch tokens gets both.

    Text and pooled embeddings stay CLIP's. Nothing in the fusion is trained: maps to ``width`` are fixed random
    rotations, and levels are averaged after a LayerNorm. The trainable form is the head ``merging/fusion``.
    """

    portable: ClassVar[bool] = False

    second: str = Field(..., description="a DINOv2 directory or hf: id, or any model reference with a patch grid")
    mode: Mode = Field("interleave", description="add, interleave tokens, or concat channels")
    share: float = Field(0.5, ge=0, le=1, description="for add: of the first tower")
    norm: bool = Field(False, description="a LayerNorm without weights per tower first")
    width: int | None = Field(None, gt=0, description="map both towers to this width; null: leave them")
    layers: tuple[int, ...] = Field((), description="blocks of CLIP's tower to average; none: its last norm's output")
    second_layers: tuple[int, ...] = Field((), description="blocks of the second tower to average, as layers")
    seed: int = Field(0, ge=0, description="of the maps to width")

    def apply(self, encoder: Encoder) -> Encoder:
        """Wrap the image tower."""
        image = encoder.image
        if isinstance(image, TwoTowersImage):
            raise InputError("merging/two-towers: the model has a second tower already; start from its CLIP")
        if image.grid is None:
            raise InputError(f"{encoder.data.origin.uri} has no grid of patch tokens; use a CLIP with a ViT")
        second = open_second(self.second, grid=image.grid)
        for name, tower, layers in (
            ("layers", image, self.layers),
            ("second_layers", second.image, self.second_layers),
        ):
            if bad := [i for i in layers if not -tower.depth <= i < tower.depth]:
                raise InputError(f"{name}: block {bad[0]} of a tower of {tower.depth}; count from 0 or back from -1")
        levels = [
            MultiLevelMerge(layers, tower.width, linear=False).requires_grad_(False) if layers else None
            for tower, layers in ((image, self.layers), (second.image, self.second_layers))
        ]
        fusion = FeatureFusion(
            (image.width, second.image.width), mode=self.mode, share=self.share, norm=self.norm, width=self.width
        )
        _draw(fusion, self.seed)
        encoder.image = TwoTowersImage(
            image,
            second,
            fusion.requires_grad_(False),
            preprocess=encoder.preprocess,
            levels=levels[0],
            second_levels=levels[1],
        )
        return encoder

    def merge(self, encoder: Encoder) -> Encoder:
        """Two towers have no plain weights: the graft stays."""
        return encoder


@torch.no_grad()
def _draw(fusion: FeatureFusion, seed: int) -> None:
    """Orthogonal maps from a generator of their own."""
    rng = torch.Generator().manual_seed(seed)
    for projection in fusion.projections:
        if isinstance(projection, nn.Linear):
            nn.init.orthogonal_(projection.weight, generator=rng)
            nn.init.zeros_(projection.bias)
