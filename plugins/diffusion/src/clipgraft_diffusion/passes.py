"""Several noisy passes per image, each freed before the next, and the official way of adding up their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

Compat = Literal["official", "fixed"]
Pass = Callable[[Tensor], Tensor]
"""A condition (B, L, D) -> the mean loss of one noisy pass, with its own noise."""


def pass_weights(passes: int, *, accumulate: int, compat: Compat) -> list[float]:
    """Weight of every pass in the loss that the trainer divides by ``accumulate``.

    ``fixed`` is the mean. The official code runs ``backward`` itself on every pass but the last and returns the last
    one, which alone is divided by the accumulation: a micro-batch leaves g1 + g2 / accumulate.
    """
    if compat == "fixed":
        return [1 / passes] * passes
    return [float(accumulate)] * (passes - 1) + [1.0]


def several_passes(
    passes: Iterable[tuple[Tensor, Pass]], *, weights: Sequence[float], compat: Compat = "fixed"
) -> Tensor:
    """Conditions (B, L, D) with what judges each -> a scalar with the weighted gradient of all passes.

    The denoiser's graph of a pass is used up at once for the gradient of its condition, so that only one is held in
    memory, and one backward through the caller's wrapper carries all: no ``backward`` inside ``forward``, which
    gradient synchronisation would miss. ``passes`` is read one by one, so that draws keep the official order.
    Its value is the mean of the passes' losses; ``official`` gives the last one, which is what that code logs.
    """
    parts, values = [], []
    for (condition, run), weight in zip(passes, weights, strict=True):
        leaf = condition.detach().requires_grad_()
        with torch.enable_grad():
            loss = run(leaf)
        (gradient,) = torch.autograd.grad(loss, leaf)
        parts.append(weight * (condition * gradient).float().sum())
        values.append(loss.detach().float())
    surrogate = torch.stack(parts).sum()
    value = values[-1] if compat == "official" else torch.stack(values).mean()
    return surrogate - surrogate.detach() + value
