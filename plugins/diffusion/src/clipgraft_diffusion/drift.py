"""How far a tower moved."""

from __future__ import annotations

from typing import Literal

import torch

from clipgraft.encoders.base import Encoder


@torch.no_grad()
def weight_drift(encoder: Encoder, base: Encoder, *, tower: Literal["image", "text"] = "image") -> float:
    """||theta - theta0|| / ||theta0|| over a tower's plain weights; an adapted weight counts as its value.

    A run with a drift near 0 has not trained, whatever its scores say.
    """
    moved, size = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for name, start in getattr(base, tower).named_parameters():
        owner, _, attribute = name.rpartition(".")
        now = getattr(getattr(encoder, tower).get_submodule(owner), attribute)
        moved += (now.double() - start.to(now.device).double()).square().sum().cpu()
        size += start.double().square().sum().cpu()
    return float((moved / size).sqrt())
