"""A SAM tower with a CLIP head as an image tower, and the graft that puts it into a CLIP."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field
from torch import Tensor

from clipgraft.config.schema import Config
from clipgraft.encoders.base import DEFAULT_REQUEST, ImageEncoder
from clipgraft.errors import InputError
from clipgraft.types import FeatureRequest, ImageFeatures
from clipgraft_merging.sam.opening import MEAN, STD, sam_parts
from clipgraft_merging.sam.promptable import Promptable
from clipgraft_merging.sam.settings import SamSettings
from clipgraft_merging.sam.tower import SamTower
from clipgraft_merging.samclip.head import ClipHead

if TYPE_CHECKING:
    from clipgraft.encoders.base import Encoder

Rgb = tuple[float, float, float]


class SamImage(ImageEncoder):
    """SAM's tower, CLIP's head, and SAM's prompt encoder and mask decoder beside them.

    ``pooled`` (B, D) and ``tokens`` (B, N, D) are in CLIP's joint space, so that patches compare with texts as they
    are; ``layers`` are the tower's, (B, N, W). ``segmenter_of(encoder)`` gives the masks.
    """

    def __init__(self, sam: SamTower, head: ClipHead, promptable: Promptable, *, embed_dim: int, size: int) -> None:
        super().__init__()
        self.sam, self.head, self.promptable = sam, head, promptable
        self.embed_dim = self.width = embed_dim
        self.depth, self.size = sam.depth, size

    @property
    def grid(self) -> tuple[int, int]:  # type: ignore[override]
        """(h, w) of the patches at the size that the encoder's preprocess gives."""
        return self.size // self.sam.patch, self.size // self.sam.patch

    def forward(self, pixels: Tensor, want: FeatureRequest = DEFAULT_REQUEST) -> ImageFeatures:
        """Standardised pixels (B, 3, H, W'), sides any multiple of the patch -> features."""
        found = self.sam.tokens(pixels, want.layers)
        patches = self.head.patches(found.tokens, found.grid)
        pooled = self.head.pooled(patches)
        if not want.tokens:
            return ImageFeatures(pooled, layers=found.layers)
        return ImageFeatures(pooled, tokens=self.head.joint(patches), grid=found.grid, layers=found.layers)


class SamImageGraft(Config):
    """The image tower becomes a SAM with a CLIP head. Weights are random; ``sam-clip`` fills and trains them."""

    portable: ClassVar[bool] = False

    sam: SamSettings = Field(SamSettings(), description="sizes of the SAM")
    size: int = Field(1024, gt=0, description="side of the images that the encoder takes [pixels]")
    blocks: int = Field(3, ge=0, description="transformer blocks of the head, each like SAM's last")
    hidden: tuple[int, ...] = Field((), description="hidden widths of the head's MLP; empty: two as wide as the tower")
    mean: Rgb = Field(MEAN, description="per channel, subtracted from pixels in [0, 1]")
    std: Rgb = Field(STD, description="per channel, divides them")
    origin: str = Field("", description="the SAM that the tower was made of, for the record")
    origin_sha256: str = Field("", description="of its tensors")

    def apply(self, encoder: Encoder) -> Encoder:
        """Replace the image tower; the text tower and the scale stay."""
        if encoder.text is None:
            raise InputError(
                f"merging/sam-image: {encoder.data.origin.uri} has no text tower, so its joint space has no words; "
                "use a CLIP with one"
            )
        patch = self.sam.vision.patch_size
        if self.size % patch:
            raise InputError(
                f"merging/sam-image: size {self.size} is no multiple of SAM's patch of {patch} pixels; set it to "
                f"{max(self.size // patch, 1) * patch} or {-(-self.size // patch) * patch}"
            )
        dim, width = encoder.image.embed_dim, self.sam.vision.hidden_size
        parts = sam_parts(self.sam.model())
        layers = parts.tower.encoder.layers
        head = ClipHead(
            layers[-1], blocks=self.blocks, width=width, hidden=self.hidden or (width, width), embed_dim=dim
        )
        encoder.image = SamImage(parts.tower, head, parts.promptable, embed_dim=dim, size=self.size)
        data = encoder.data
        data.preprocess = replace(data.preprocess, size=(self.size, self.size), mean=self.mean, std=self.std)
        data.origin = replace(data.origin, architecture=f"SAM-{width}x{len(layers)}-p{patch}")
        if data.model_config:
            data.model_config = {**data.model_config, "vision_cfg": _stand_in(self.size, patch)}
        return encoder

    def merge(self, encoder: Encoder) -> Encoder:
        """open_clip has no such tower: nothing to fold."""
        return encoder


def _stand_in(size: int, patch: int) -> dict[str, Any]:
    """The smallest image tower of that size: opening an export builds it, only for this graft to replace it."""
    return {"image_size": size, "patch_size": patch, "width": 64, "layers": 1, "head_width": 64}


def set_size(encoder: Encoder, size: int) -> None:
    """Let ``encoder`` take images of ``size`` pixels; no weight changes."""
    encoder.image.size = size  # type: ignore[assignment]
    encoder.data.preprocess = replace(encoder.preprocess, size=(size, size))
    if encoder.data.model_config:
        encoder.data.model_config["vision_cfg"]["image_size"] = size


class SamResolution(Config):
    """Another image size for a CLIP on SAM's tower; positions are resized on the fly, no weight changes."""

    portable: ClassVar[bool] = False

    size: int = Field(..., gt=0, description="side of the images that the encoder takes [pixels]")

    def apply(self, encoder: Encoder) -> Encoder:
        """Change what preprocess says."""
        image = encoder.image
        if not isinstance(image, SamImage):
            raise InputError("merging/sam-resolution: this CLIP has no SAM tower; use core/resize-positions")
        if self.size % image.sam.patch:
            raise InputError(
                f"merging/sam-resolution: size {self.size} is no multiple of SAM's patch of {image.sam.patch} pixels; "
                f"set it to {max(self.size // image.sam.patch, 1) * image.sam.patch}"
            )
        set_size(encoder, self.size)
        return encoder

    def merge(self, encoder: Encoder) -> Encoder:
        """Nothing to fold."""
        return encoder
