"""Grafts of the core that need no new tensors.

A graft here is its own config: a frozen pydantic model with ``apply`` and ``merge``.
"""

from __future__ import annotations

import re
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from clipgraft.config.schema import Config
from clipgraft.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from clipgraft.encoders.base import Encoder

AFTER_BLOCKS = {"ln_post", "proj", "ln_final", "text_projection", "norm", "fc_norm", "attn_pool", "attnpool", "head"}


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter laid over a weight (torch's parametrizations)."""
    return ".parametrizations." in name and not name.endswith(".original")


class Freeze(Config):
    """Take the gradient from towers, all but what ``keep`` and ``keep_last`` name. Adapters keep theirs."""

    towers: tuple[Literal["image", "text", "scale"], ...] = Field(("image",), description="parts to freeze")
    keep: tuple[str, ...] = Field((), description="patterns of tensor names that stay trainable, such as *.ln_post.*")
    keep_last: int = Field(0, ge=0, description="top blocks that stay trainable, with what follows them [blocks]")

    def apply(self, encoder: Encoder) -> Encoder:
        """Set ``requires_grad``; frozen modules stay in eval mode (see ``Encoder.train``)."""
        used = set()
        for name, parameter in encoder.named_parameters():
            kept = {p for p in self.keep if fnmatchcase(name, p)}
            used |= kept
            tower = name.split(".")[0]
            if (tower if tower in ("image", "text") else "scale") in self.towers and not is_adapter(name):
                parameter.requires_grad_(bool(kept) or self._is_last(encoder, name))
        if missing := sorted(set(self.keep) - used):
            example = next(iter(encoder.state_dict()))
            raise InputError(f"core/freeze: keep {missing[0]!r} matches no tensor; names look like {example}")
        return encoder

    def _is_last(self, encoder: Encoder, name: str) -> bool:
        _, _, rest = name.partition(".tower.")
        if not self.keep_last or not rest:
            return False
        if block := re.search(r"(?:resblocks|blocks|layers?)\.(\d+)\.", rest):
            pattern = re.compile(re.escape(rest[: block.start(1)]) + r"(\d+)\.")
            depth = 1 + max(int(m[1]) for n, _ in encoder.named_parameters() if (m := pattern.search(n)))
            return int(block[1]) >= depth - self.keep_last
        return rest.removeprefix("trunk.").split(".")[0] in AFTER_BLOCKS

    def merge(self, encoder: Encoder) -> Encoder:
        """Nothing to fold."""
        return encoder


def resize_grid(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """(h*w, W) positions of the ``old`` grid -> (h'*w', W) of the ``new`` one, bicubic with antialiasing."""
    from torch.nn import functional as F

    grid = positions.detach().float().reshape(*old, -1).permute(2, 0, 1)[None]
    grid = F.interpolate(grid, size=new, mode="bicubic", antialias=True, align_corners=False)
    return grid[0].permute(1, 2, 0).flatten(0, 1).to(positions.dtype)


class ResizePositions(Config):
    """Another image size: the positional grid is resized, preprocess and configuration follow."""

    size: int | tuple[int, int] = Field(..., description="new image size, one side or height and width [pixels]")

    def apply(self, encoder: Encoder) -> Encoder:
        """Resize in place."""
        import torch
        from torch import nn

        from clipgraft.encoders.towers import ResNetImage, TimmImage, VitImage

        size = (self.size, self.size) if isinstance(self.size, int) else self.size
        image: Any = encoder.image
        tower: Any = getattr(image, "tower", None)
        vision = encoder.data.model_config.get("vision_cfg", {})
        if isinstance(image, TimmImage) and image.grid:
            patch = tower.trunk.patch_embed.patch_size
        elif isinstance(image, (VitImage, ResNetImage)):
            patch = tower.patch_size if isinstance(image, VitImage) else (32, 32)
        else:
            raise InputError("core/resize-positions knows open_clip's ViT and ResNet and timm's ViT; use one of them")
        if size[0] % patch[0] or size[1] % patch[1]:
            raise InputError(f"core/resize-positions: {size} is no multiple of the patch size {tuple(patch)}")
        if isinstance(image, ResNetImage) and size[0] != size[1]:
            raise InputError(f"core/resize-positions: a ResNet tower takes square images, got {size}")
        if isinstance(image, TimmImage):
            tower.set_input_size(size)
            _timm_name(vision, size)
        else:
            owner = tower if isinstance(image, VitImage) else tower.attnpool
            old, grid = owner.positional_embedding, (size[0] // patch[0], size[1] // patch[1])
            new = torch.cat([old[:1].detach(), resize_grid(old[1:], image.grid, grid)])
            owner.positional_embedding = nn.Parameter(new, requires_grad=old.requires_grad)
            tower.grid_size, tower.image_size = grid, size if isinstance(image, VitImage) else size[0]
        vision["image_size"] = size[0] if size[0] == size[1] else list(size)
        encoder.data.preprocess = replace(encoder.preprocess, size=size)
        return encoder

    def merge(self, encoder: Encoder) -> Encoder:
        """Nothing to fold: the resized positions are plain weights."""
        return encoder


def _timm_name(vision: dict[str, Any], size: tuple[int, int]) -> None:
    """open_clip passes no size to timm: take the registered model of that size, else note the difference."""
    import timm

    other = re.sub(r"_\d+$", f"_{size[0]}", vision["timm_model_name"])
    if size[0] == size[1] and timm.is_model(other) and "timm_kwargs" not in vision:
        vision["timm_model_name"] = other
    else:
        vision["timm_kwargs"] = {**vision.get("timm_kwargs", {}), "img_size": list(size)}
