"""Frozen modules that another module calls without registering them."""

from __future__ import annotations

from torch import nn


def set_aside(owner: nn.Module, name: str, module: nn.Module | None) -> None:
    """``owner.name = module``, but neither its parameters nor its buffers become the owner's.

    DistributedDataParallel would broadcast a registered generator once at its start and its buffers in every step, for
    nothing: a frozen module is equal in all processes already. The module must be on its device before.
    """
    object.__setattr__(owner, name, module)
