"""OPCM's projection: what a new task vector may add to a merged one without touching its directions.

Tang et al., Merging Models on the Fly Without Retraining, NeurIPS 2025, arXiv 2501.09522. For a weight (m, n) with the
merged task vector D = U S V' and the new one tau, let M = U' tau V. Entries of M along D's own directions are dropped:
the diagonal, and what lies between the r strongest directions. The rest is added: P(tau) = U M V'.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clipgraft.errors import InputError

Mode = Literal["code", "paper"]
Compat = Literal["none", "fusionbench"]


@dataclass(frozen=True, slots=True)
class Directions:
    """The directions of a merged task vector: ``left`` (m, k), ``values`` (k,) falling, ``right`` (n, k).

    ``rank``: how many of the strongest are protected from each other too.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    rank: int


def check_alpha(alpha: float) -> None:
    """Raise unless 0 <= alpha < 1."""
    if not 0 <= alpha < 1:
        raise InputError(
            f"alpha is {alpha:g}; give 0 <= alpha < 1: at 1 the number of directions would be decided by rounding"
        )


def split_rank(values: Tensor, *, alpha: float) -> int:
    """(k,) singular values -> the first index, from 0, at which their running share exceeds alpha.

    So r directions hold at most alpha of the sum; if the first alone exceeds alpha, r is 0 and only the diagonal goes.
    The documentation of the official code tells of an r that includes the index; its code does not.
    """
    check_alpha(alpha)
    above = values.cumsum(0) / values.sum() > alpha
    return int(above.to(torch.uint8).argmax())


def directions(merged: Tensor, *, alpha: float, compat: Compat = "none") -> Directions | None:
    """(m, n) merged task vector -> its directions; None where it is zero, since nothing is to be protected there.

    Deviation: directions without energy (below rounding) are left out; their basis is arbitrary, and the official code
    removes the new task's diagonal along it. ``compat`` "fusionbench" keeps them, and of a zero matrix all.
    """
    if compat == "none" and not bool(merged.any()):
        check_alpha(alpha)
        return None
    left, values, right = torch.linalg.svd(merged, full_matrices=False)
    rank = split_rank(values, alpha=alpha)
    if compat == "none":
        floor = values[0] * max(merged.shape) * torch.finfo(values.dtype).eps
        kept = int((values > floor).sum())
        left, values, right = left[:, :kept], values[:kept], right[:kept]
    return Directions(left, values, right.T, min(rank, len(values)))


def removed(task: Tensor, found: Directions, *, mode: Mode = "code") -> Tensor:
    """(m, n) -> (m, n): the part of the new task vector that is dropped.

    ``code`` drops the diagonal and the block between the r strongest directions; what links one of them to a weaker one
    (u_1 v_last') stays. ``paper`` starts both sums behind r, so these links are dropped too. Only the k directions of
    D are needed: what lies outside them is never dropped in ``code``, so no basis of the null space is completed.
    """
    left, right, r = found.left, found.right, found.rank
    inner = left.T @ task @ right  # (k, k)
    dropped = torch.diag(inner.diagonal())
    if mode == "code":
        dropped[:r, :r] = inner[:r, :r]
        return left @ dropped @ right.T
    dropped[:r, :r] = 0
    rows = left[:, :r] @ (left[:, :r].T @ task)
    columns = (task - rows) @ right[:, :r] @ right[:, :r].T
    return left @ dropped @ right.T + rows + columns


def project(
    task: Tensor, merged: Tensor, *, alpha: float = 0.5, mode: Mode = "code", compat: Compat = "none"
) -> Tensor:
    """(m, n) new task vector, (m, n) merged one -> (m, n): what is added to the merged one.

    An orthogonal projection that depends on ``merged`` by its directions and the shares of its singular values, so not
    by its scale.
    """
    found = directions(merged, alpha=alpha, compat=compat)
    return task if found is None else task - removed(task, found, mode=mode)
