"""Two streams of data in one optimizer step, with the graph of only one of them alive at a time.

A step of the multi-task stage is a backward pass over CLIP's images, then one over SAM's, then the optimizer (section
3.2). The training loop runs one forward and one backward. So the first stream's backward runs inside the forward: its
gradients are taken and its graph is freed; what remains is a scalar that hands them on when the loop's own backward
comes. They meet the second stream's in autograd, before DDP averages them, which therefore happens once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class _Known(torch.autograd.Function):
    """A scalar whose gradients were computed before."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *rest: Tensor) -> Tensor:
        """``rest``: ``count`` gradients, then the parameters that they belong to."""
        ctx.save_for_backward(*rest[:count])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        """Each gradient times the incoming one, such as 1 / chunks."""
        grads = ctx.saved_tensors
        return (None, None, *[None] * len(grads), *[g * incoming[0] for g in grads])


def taken(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """The scalar ``loss`` () with its backward done and its graph freed: gradients of ``parameters`` travel with it.

    Parameters that the loss doesn't reach are left to the other stream. Not for fp16: nothing scales this backward.
    """
    with torch.autocast(loss.device.type, enabled=False):
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = [(p, g) for p, g in zip(parameters, grads, strict=True) if g is not None]
    return _Known.apply(loss.detach(), len(pairs), *(g for _, g in pairs), *(p for p, _ in pairs))  # type: ignore[no-any-return,no-untyped-call]
