"""Merging tokens: which go into which, and the weighted mean that keeps what was merged.

x (N, n, W) tokens of N clips, the first c of which are class tokens and never merged; s (N, n) how many original tokens
each stands for. Bolya et al., Token Merging, ICLR 2023, arXiv 2210.09461; Shen et al., TempMe, arXiv 2409.01156.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Plan:
    """Which patch goes where. Patches lie alternately in A and B, the first in A.

    ``kept`` (N, a - r) and ``gone`` (N, r) places in A, ``into`` (N, r) places in B of the latter.
    """

    kept: Tensor
    gone: Tensor
    into: Tensor


def removable(patches: int, wanted: int) -> int:
    """At most half of the patches can go in one merge."""
    return max(min(wanted, patches // 2), 0)


def match(metric: Tensor, remove: int) -> Plan:
    """Patches (N, p, M): each of A looks for its most cosine-similar of B; the ``remove`` closest pairs merge."""
    with torch.no_grad():
        unit = F.normalize(metric.float(), dim=-1)
        near, into = (unit[:, 0::2] @ unit[:, 1::2].transpose(1, 2)).max(-1)  # (N, a)
        order = near.argsort(dim=-1, descending=True)
        gone, kept = order[:, :remove], order[:, remove:].sort(-1).values
        return Plan(kept, gone, into.gather(1, gone))


def merge(x: Tensor, sizes: Tensor, plan: Plan, classes: int) -> tuple[Tensor, Tensor]:
    """Tokens and sizes after the merge: class tokens, what is left of A in its order, B. Means weighted by size."""
    weighted = x * sizes[..., None]
    heads, patches = (weighted[:, :classes], weighted[:, classes:]), (sizes[:, :classes], sizes[:, classes:])
    a, b = heads[1][:, 0::2], heads[1][:, 1::2]
    sa, sb = patches[1][:, 0::2], patches[1][:, 1::2]

    def rows(places: Tensor, like: Tensor) -> Tensor:
        return places[..., None].expand(-1, -1, like.shape[-1])

    b = b.scatter_add(1, rows(plan.into, b), a.gather(1, rows(plan.gone, a)))
    sb = sb.scatter_add(1, plan.into, sa.gather(1, plan.gone))
    left, sizes_left = a.gather(1, rows(plan.kept, a)), sa.gather(1, plan.kept)
    total, size = torch.cat([heads[0], left, b], 1), torch.cat([patches[0], sizes_left, sb], 1)
    return total / size[..., None], size


def join(x: Tensor, groups: int, classes: int) -> Tensor:
    """(N, n, ...) -> (N / groups, groups n, ...): neighbouring clips side by side, all class tokens in front."""
    each = x.unflatten(0, (-1, groups))
    front, rest = each[:, :, :classes], each[:, :, classes:]
    return torch.cat([front.flatten(1, 2), rest.flatten(1, 2)], 1)


@dataclass(frozen=True)
class Settings:
    """``per_layer`` patches leave in each of the first blocks, then each block joins so many clips as ``joins`` says;

    ``between``: share of the joined tokens that leaves at a join, ``within``: that leaves behind attention from there;
    ``after`` blocks follow the last join.
    """

    per_layer: int = 2
    joins: tuple[int, ...] = (2, 2, 3)
    between: float = 0.3
    within: float = 0.1
    after: int = 1

    def first_join(self, depth: int) -> int:
        """The block that joins first."""
        return depth - len(self.joins) - self.after

    @property
    def whole(self) -> int:
        """Frames that become one clip."""
        return math.prod(self.joins)


def schedule(tokens: int, frames: int, depth: int, settings: Settings) -> list[tuple[int, int]]:
    """(tokens per clip, clips) behind every block, of ``frames`` pictures with ``tokens`` each (class token too)."""
    n, clips, classes, found = tokens, frames, 1, []
    for index in range(depth):
        at = index - settings.first_join(depth)
        if at < 0:
            n -= removable(n - classes, settings.per_layer)
        else:
            if at < len(settings.joins) and frames > 1:
                k = settings.joins[at]
                n, clips, classes = n * k, clips // k, classes * k
                n -= removable(n - classes, math.floor(settings.between * n))
            n -= removable(n - classes, math.floor(settings.within * n))
        found.append((n, clips))
    return found
