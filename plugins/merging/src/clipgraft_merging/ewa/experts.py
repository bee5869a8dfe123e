"""Experts Weights Averaging: copies of a feed-forward network that see different tokens and drift together again.

T tokens of a batch, W width, N experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from clipgraft.errors import InputError
from clipgraft_merging.feed_forwards import mean_network


class AveragedExperts(nn.Module):
    """N copies of ``network``. In train mode a random N-th of all tokens goes to each, so a step costs what it did.

    In eval mode every token sees the mean of the experts, which is what ``collapse`` returns. Nothing is routed: there
    is no gate and no balance loss (section 3.2).
    """

    def __init__(self, network: nn.Module, *, experts: int = 4) -> None:
        super().__init__()
        if experts < 1:
            raise InputError(f"experts is {experts}; give 1 or more")
        self.experts = nn.ModuleList([network, *(deepcopy(network) for _ in range(experts - 1))])

    @property
    def c_fc(self) -> nn.Module:
        """The first expert's first layer: open_clip asks a block's network for its dtype there."""
        return self.experts[0].c_fc  # type: ignore[union-attr, return-value]

    def forward(self, x: Tensor) -> Tensor:
        """(..., W) -> (..., W)."""
        if len(self.experts) == 1:
            return self.experts[0](x)  # type: ignore[no-any-return]
        if not self.training:
            return torch.func.functional_call(self.experts[0], self.mean(), (x,))  # type: ignore[no-any-return]
        flat = x.reshape(-1, x.shape[-1])  # (T, W)
        order = torch.randperm(len(flat), device=flat.device)
        parts = flat[order].tensor_split(len(self.experts))  # sizes differ by one at most
        out = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return out[back].view(x.shape)

    def mean(self) -> dict[str, Tensor]:
        """The mean of every tensor over the experts, under the names of one network."""
        return {
            name: torch.stack([expert.get_parameter(name) for expert in self.experts]).mean(0)
            for name, _ in self.experts[0].named_parameters()
        }

    def collapse(self) -> nn.Module:
        """One network with the mean weights and the names that the block had before."""
        return mean_network(self.experts)


@torch.no_grad()
def draw_together(modules: Sequence[AveragedExperts], share: float) -> None:
    """Every expert gives the share b of its weights for the others' mean:

    W_i <- (1 - b) W_i + b / (N - 1) * sum_{j != i} W_j. The mean stays; deviations from it shrink by 1 - b N / (N - 1).
    Optimizer moments are left alone. Ranks with equal weights stay equal, since nothing is drawn.
    """
    for module in modules:
        count = len(module.experts)
        if count == 1 or not share:
            continue
        for name, _ in module.experts[0].named_parameters():
            weights = [expert.get_parameter(name) for expert in module.experts]
            total = torch.stack(weights).sum(0)
            keep = 1 - share - share / (count - 1)
            torch._foreach_mul_(weights, keep)
            torch._foreach_add_(weights, [total * (share / (count - 1))] * count)


def share_at(step: int, *, share: float, ramp: int) -> float:
    """The share after optimizer step ``step`` (from 0): linear to ``share`` over ``ramp`` steps, then constant."""
    return share * min(1.0, (step + 1) / ramp) if ramp else share


def check_share(share: float, *, experts: int) -> None:
    """``InputError`` for a share that makes experts change sides; (N - 1) / N makes all of them equal."""
    limit = (experts - 1) / experts
    if experts > 1 and not 0 <= share < limit:
        raise InputError(
            f"share is {share}; with {experts} experts it must be below {limit:.4g}, where all experts become equal"
        )
