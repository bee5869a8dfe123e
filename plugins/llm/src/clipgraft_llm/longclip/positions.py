"""Knowledge-preserved stretching of text positions, as one fixed matrix (Zhang et al., Long-CLIP, section 3.1).

L positions before, T after, k the number of positions that are kept, W width of the text tower.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def stretched_length(length: int, *, keep: int, ratio: int) -> int:
    """T of ``ratio`` places for each of the positions behind the first ``keep``: 77, 20 and 4 give 248."""
    return keep + ratio * (length - keep)


def stretch_matrix(length: int, *, keep: int, context: int) -> Tensor:
    """A (T, L) float64 with new positions = A @ old ones; rows add up to one.

    The first ``keep`` rows copy. Row keep + m stands at the old place keep + m (L - keep) / (T - keep): between two old
    positions it is interpolated, behind the last one it goes on in the direction of the last two. Where T - keep is a
    multiple of L - keep every old position survives (the paper: T = 248); other T are the same line at another pace.
    """
    if not 0 <= keep <= length - 2 or context <= length:
        raise ValueError(f"can't stretch {length} positions to {context} and keep {keep}")
    matrix = torch.zeros(context, length, dtype=torch.float64)
    matrix[range(keep), range(keep)] = 1
    new, old = context - keep, length - keep
    for m in range(new):
        whole, part = divmod(m * old, new)  # integers: a position that survives does so to the bit
        left = min(keep + whole, length - 2)
        share = (keep + whole - left) + part / new
        matrix[keep + m, left] += 1 - share
        matrix[keep + m, left + 1] += share
    return matrix


def interpolation_matrix(length: int, *, context: int) -> Tensor:
    """A (T, L) float64 that resamples all positions alike, as open_clip does on loading: the way that loses them."""
    eye = torch.eye(length, dtype=torch.float64)[None]  # (1, L, L): a channel for each old position
    return F.interpolate(eye, size=context, mode="linear", align_corners=False)[0].T.contiguous()


def stretched(positions: Tensor, matrix: Tensor) -> Tensor:
    """(L, W) and A (T, L) -> (T, W), computed in float64 and rounded once to the type of ``positions``.

    Deviation: the official code computes in half precision.
    """
    return (matrix @ positions.detach().cpu().double()).to(positions)  # some devices have no float64
