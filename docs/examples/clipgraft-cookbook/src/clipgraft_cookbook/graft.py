"""A shallower image tower: the last blocks are taken out. Train it afterwards; it has forgotten how to end."""

from pydantic import Field

from clipgraft.config.schema import Config
from clipgraft.encoders.base import Encoder
from clipgraft.encoders.towers import VitImage
from clipgraft.errors import InputError


class DropBlocks(Config):
    """A graft is its own config. What it leaves is a plain CLIP, so there is nothing to fold."""

    count: int = Field(1, gt=0, description="blocks to take out [blocks]")

    def apply(self, encoder: Encoder) -> Encoder:
        """Change the tower in place, and what is known about its architecture with it."""
        if not isinstance(encoder.image, VitImage):
            raise InputError("cookbook/drop-blocks knows open_clip's ViT; use a model with one")
        left = encoder.image.depth - self.count
        if left < 1:
            raise InputError(f"cookbook/drop-blocks: the tower has {encoder.image.depth} blocks; take out fewer")
        blocks = encoder.image.tower.transformer.resblocks
        del blocks[left:]
        encoder.image.depth = left
        encoder.data.model_config["vision_cfg"]["layers"] = left
        return encoder

    def merge(self, encoder: Encoder) -> Encoder:
        """Nothing to fold."""
        return encoder
