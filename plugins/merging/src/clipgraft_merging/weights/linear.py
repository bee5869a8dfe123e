"""Linear combinations of the inputs' tensors, accumulated in fp64 and cast once.

Numbers come in pieces that fit a processor's cache, so the wide accumulator costs neither memory nor time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from clipgraft_merging.weights.inputs import BASE, Inputs

PIECE = 1 << 18
"""Numbers at a time: 1 MB of fp32, 2 MB of accumulator."""


def pieces(key: str, inputs: Inputs) -> Iterator[tuple[int, int]]:
    """(start, stop) of the pieces of a tensor."""
    count = math.prod(inputs.shape(key))
    return ((start, min(start + PIECE, count)) for start in range(0, count, PIECE))


def mean(key: str, inputs: Inputs, models: Sequence[int]) -> Tensor:
    """The mean of these models in their dtype. N copies of one give it back; the order leaves the same bits."""
    if len(models) == 1:
        return inputs.tensor(models[0], key)
    return _summed(key, inputs, [(1.0, index) for index in models], count=len(models))


def combine(key: str, inputs: Inputs, terms: Sequence[tuple[float, int]]) -> Tensor:
    """sum of weight * model over (weight, index), where ``BASE`` is the base; terms of weight 0 are not read.

    One term of weight 1 comes back as it is, so ends of a path are exact.
    """
    terms = [(weight, index) for weight, index in terms if weight]
    if len(terms) == 1 and terms[0][0] == 1.0:
        index = terms[0][1]
        return inputs.base_tensor(key) if index == BASE else inputs.tensor(index, key)
    return _summed(key, inputs, terms)


def total(key: str, inputs: Inputs, models: Sequence[int]) -> Tensor:
    """The sum of these models in fp64, a tensor of its own."""
    return _summed(key, inputs, [(1.0, index) for index in models], dtype=torch.float64)


def _summed(
    key: str, inputs: Inputs, terms: Sequence[tuple[float, int]], *, count: int = 1, dtype: torch.dtype | None = None
) -> Tensor:
    found = torch.empty(inputs.shape(key), dtype=dtype or inputs.dtype(key))
    flat, sums = found.view(-1), torch.empty(PIECE, dtype=torch.float64)
    for start, stop in pieces(key, inputs):
        accumulator = sums[: stop - start].zero_()
        for weight, index in terms:
            accumulator.add_(inputs.piece(index, key, start, stop), alpha=weight)
        flat[start:stop] = accumulator.div_(count)
    return found
