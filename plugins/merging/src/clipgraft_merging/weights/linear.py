"""Linear combinations of tensors, accumulated in fp64 and cast once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def mean(tensors: Iterable[Tensor], *, count: int) -> Tensor:
    """The mean of ``count`` tensors in their dtype. N copies of one give it back, in any order the same bits."""
    if count == 1:
        return next(iter(tensors))
    total, dtype = _sum((1.0, tensor) for tensor in tensors)
    return total.div_(count).to(dtype)


def combine(terms: Iterable[tuple[float, Tensor]]) -> Tensor:
    """sum_i w_i x_i in the dtype of the x. One term of weight 1 comes back as it is: ends of a path are exact."""
    rest = iter(terms)
    first = next(rest)
    second = next(rest, None)
    if second is None and first[0] == 1.0:
        return first[1]
    total, dtype = _sum(_chained(first, second, rest))
    return total.to(dtype)


def _chained(
    first: tuple[float, Tensor], second: tuple[float, Tensor] | None, rest: Iterable[tuple[float, Tensor]]
) -> Iterable[tuple[float, Tensor]]:
    yield first
    if second is not None:
        yield second
    yield from rest


def _sum(terms: Iterable[tuple[float, Tensor]]) -> tuple[Tensor, torch.dtype]:
    total, dtype = None, torch.float32
    for weight, tensor in terms:
        if total is None:
            total, dtype = torch.zeros(tensor.shape, dtype=torch.float64), tensor.dtype
        total.add_(tensor, alpha=weight)
    if total is None:
        raise ValueError("a combination of nothing")
    return total, dtype
