"""Features of teachers on one scale: PHI-S (Ranzinger et al., arXiv 2410.01680) and simpler ways."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from clipgraft.errors import InputError
from clipgraft_merging.agglomerate.hadamard import hadamard
from clipgraft_merging.agglomerate.statistics import Moments

Normalise = Literal["none", "standardise", "whiten", "phi-s"]


class Normaliser(nn.Module):
    """y -> W (y - mean) and back, both (..., D). An untrained one changes nothing.

    With covariance U L U^T: ``standardise`` divides every dimension by its spread. ``whiten`` is L^-1/2 U^T, after
    which errors in directions of small variance weigh as much as any. ``phi-s`` is (mean of L)^-1/2 H U^T with a
    Hadamard matrix H of unit rows: every dimension has variance one and errors keep their proportions, because W is a
    rotation times a number (section 3 of the paper).
    """

    mean: Tensor
    matrix: Tensor
    inverse: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("matrix", torch.eye(width))
        self.register_buffer("inverse", torch.eye(width))

    @torch.no_grad()
    def fit(self, moments: Moments, kind: Normalise, *, teacher: str = "teacher") -> None:
        """Set the transform from what was seen."""
        if kind == "none":
            return
        matrix, inverse = transform(moments, kind, teacher=teacher)
        self.mean.copy_(moments.mean)
        self.matrix.copy_(matrix)
        self.inverse.copy_(inverse)

    def forward(self, y: Tensor) -> Tensor:
        """The teacher's features (..., D) as targets."""
        with torch.autocast(y.device.type, enabled=False):  # in full precision, or W is no rotation any more
            return (y.to(self.matrix.dtype) - self.mean) @ self.matrix.T

    def restored(self, z: Tensor) -> Tensor:
        """What the student predicts (..., D) as the teacher would say it."""
        return z.to(self.inverse.dtype) @ self.inverse.T + self.mean


def transform(moments: Moments, kind: Normalise, *, teacher: str = "teacher") -> tuple[Tensor, Tensor]:
    """W and its inverse, (D, D) float64 each; ``InputError`` when the features don't allow it."""
    covariance, width = moments.covariance(), len(moments.mean)
    if moments.count < 2 or float(covariance.diagonal().max()) <= 0:
        raise InputError(f"{teacher}: its features never change over {moments.count} rows; raise statistics.samples")
    if kind == "standardise":
        spread = covariance.diagonal().sqrt().clamp(min=1e-6)
        return torch.diag(1 / spread), torch.diag(spread)
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp(min=0)
    if kind == "whiten":
        spread = values.sqrt().clamp(min=1e-6 * float(values.max().sqrt()))
        return torch.diag(1 / spread) @ vectors.T, vectors @ torch.diag(spread)
    try:
        rotation = hadamard(width) / width**0.5 @ vectors.T
    except InputError as error:
        raise InputError(f"{teacher} has {width} dimensions: {error}") from None
    scale = float(values.mean().sqrt())
    return rotation / scale, rotation.T * scale
