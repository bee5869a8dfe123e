"""How far a tower moved."""

from __future__ import annotations

import torch

from clipgraft.encoders.base import Encoder


@torch.no_grad()
def weight_drift(encoder: Encoder, base: Encoder) -> float:
    """||theta - theta0|| / ||theta0|| over the image tower's plain weights; an adapted weight counts as its value.

    A run with a drift near 0 has not trained, whatever its scores say.
    """
    moved, size = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for name, start in base.image.named_parameters():
        owner, _, attribute = name.rpartition(".")
        now = getattr(encoder.image.get_submodule(owner), attribute)
        moved += (now.double() - start.double()).square().sum().cpu()
        size += start.double().square().sum().cpu()
    return float((moved / size).sqrt())
