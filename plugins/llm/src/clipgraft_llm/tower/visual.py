"""The image tower's last projection, drawn anew for another joint space."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from clipgraft.encoders.towers import TimmImage, VitImage
from clipgraft.errors import InputError

if TYPE_CHECKING:
    from clipgraft.encoders.base import Encoder


def reset_projection(encoder: Encoder, *, embed_dim: int) -> None:
    """In place: a random map from the tower's width to ``embed_dim``, as open_clip draws it for a new model.

    open_clip's ViT and timm towers with a linear projection; ``InputError`` for others. The configuration follows.
    """
    image, tower = encoder.image, getattr(encoder.image, "tower", None)
    tower: Any
    if isinstance(image, VitImage) and tower.proj is not None:
        old = tower.proj
        new = torch.randn(len(old), embed_dim, device=old.device, dtype=old.dtype) * len(old) ** -0.5
        tower.proj = nn.Parameter(new, requires_grad=old.requires_grad)
        tower.output_dim = embed_dim
    elif isinstance(image, TimmImage) and isinstance(projection := getattr(tower.head, "proj", None), nn.Linear):
        new = nn.Linear(projection.in_features, embed_dim, bias=projection.bias is not None)
        tower.head.proj = new.to(projection.weight)
    else:
        raise InputError(
            "this image tower ends without a linear projection, so its joint space can't be changed; leave text.joint "
            "and text.reset_visual out"
        )
    image.embed_dim = embed_dim
    if encoder.data.model_config:
        encoder.data.model_config = {**encoder.data.model_config, "embed_dim": embed_dim}
