"""Activations of an image tower's blocks computed again in the backward pass: less memory, one more forward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from clipgraft.encoders.base import ImageEncoder
from clipgraft.errors import InputError


def blocks_of(image: ImageEncoder) -> list[nn.Module]:
    """The transformer blocks of a tower; none for a convolutional one."""
    tower: Any = image.tower
    for path in ("transformer.resblocks", "trunk.blocks"):
        owner, _, name = path.partition(".")
        if isinstance(found := getattr(getattr(tower, owner, None), name, None), nn.ModuleList | nn.Sequential):
            return list(found)
    return []


def recompute_blocks(image: ImageEncoder) -> None:
    """Keep each block's input alone until the backward pass; the gradients stay what they are, dropout included.

    open_clip's own switch recomputes an adapted weight at every access, which the forward pass does once, and fails.
    """
    if not (blocks := blocks_of(image)):
        raise InputError("checkpointing needs an image tower of transformer blocks; choose a ViT or switch it off")
    for block in blocks:
        block.forward = _recomputed(block.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **more: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **more)
        return checkpoint(
            forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), parametrize.cached()), **more
        )

    return run
