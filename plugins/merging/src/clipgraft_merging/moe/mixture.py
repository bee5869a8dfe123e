"""A feed-forward network of several experts: a gate chooses some of them for every token.

B samples, L tokens, W width, E experts, k experts per token, T = B * L.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft.errors import InputError
from clipgraft.types import widened


@dataclass(frozen=True, slots=True)
class Routing:
    """What a gate decided: ``probabilities`` (B, L, E) over all experts, ``chosen`` (B, L, k) of them, best first."""

    probabilities: Tensor
    chosen: Tensor


class Mixture(nn.Module):
    """Experts of one shape in the place of a block's feed-forward network (CLIP-MoE, section 3.2).

    A token's output is the sum of its ``top_k`` experts' outputs, weighted by the gate's softmax over all experts,
    made to sum to one over those k. The gate works in fp32. ``dropout`` falls on an expert's hidden units while the
    mixture is in train mode, even where the experts are frozen.
    """

    def __init__(self, experts: Sequence[nn.Module], *, top_k: int = 2, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        if not 2 <= top_k <= len(experts):
            # the weight of a single expert is always one: no gradient of the task would reach the gate
            raise InputError(f"top_k is {top_k} for {len(experts)} experts; choose 2 to {len(experts)}")
        self.experts, self.top_k, self.dropout = nn.ModuleList(experts), top_k, dropout
        like: Tensor = experts[0].c_fc.weight  # type: ignore[union-attr, assignment]
        width = like.shape[1]
        shape = {"bias": False, "device": like.device, "dtype": like.dtype}
        self.gate = nn.utils.skip_init(nn.Linear, width, len(experts), **shape)
        # nn.Linear's own distribution, from a generator of its own: the global random state stays as it is
        drawn = torch.rand(len(experts), width, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            self.gate.weight.copy_((2 * drawn - 1) / width**0.5)
        self._record: list[Routing] | None = None

    @property
    def c_fc(self) -> nn.Module:
        """The first expert's first layer: open_clip asks a block's network for its dtype there."""
        return self.experts[0].c_fc  # type: ignore[union-attr, return-value]

    def route(self, x: Tensor) -> tuple[Tensor, Routing]:
        """(B, L, W) -> weights (B, L, k) that sum to one, and the decision."""
        with torch.autocast(x.device.type, enabled=False):
            probabilities = F.linear(widened(x), widened(self.gate.weight)).softmax(-1)
        weights, chosen = probabilities.topk(self.top_k, dim=-1)
        return weights / weights.sum(-1, keepdim=True), Routing(probabilities, chosen)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, W) -> (B, L, W). Tokens are sorted by expert, so that each expert sees one matrix."""
        weights, routing = self.route(x)
        if self._record is not None:
            self._record.append(routing)
        flat, chosen = x.reshape(-1, x.shape[-1]), routing.chosen.flatten()  # (T, W), (T*k,)
        order = chosen.argsort(stable=True)
        # the one place where the host waits: it has to know how long each expert's matrix is
        counts = chosen.bincount(minlength=len(self.experts)).tolist()
        parts = flat[order // self.top_k].split(counts)
        # an expert without tokens still runs, on no rows: its gradient is zero rather than missing
        out = torch.cat([self._expert(e, part) for e, part in enumerate(parts)])  # (T*k, W)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        out = out[back].view(*weights.shape, -1)  # (B, L, k, W): no atomic additions, so exactly repeatable
        return (out * weights[..., None].to(out.dtype)).sum(-2)

    def _expert(self, index: int, x: Tensor) -> Tensor:
        """(n, W) -> (n, W); hidden units are dropped between the activation and the last layer."""
        expert = self.experts[index]
        if not (self.training and self.dropout):
            return expert(x)  # type: ignore[no-any-return]
        for name, layer in expert.named_children():
            x = layer(F.dropout(x, self.dropout) if name == "c_proj" else x)
        return x


def mixtures(module: nn.Module) -> dict[str, Mixture]:
    """The mixtures inside ``module`` by name, in the order of its modules."""
    return {name: m for name, m in module.named_modules() if isinstance(m, Mixture)}


@contextmanager
def routings(tower: nn.Module) -> Iterator[list[Routing]]:
    """What the gates of ``tower`` decide meanwhile, in the order in which they are asked."""
    found: list[Routing] = []
    gates = mixtures(tower).values()
    for gate in gates:
        gate._record = found
    try:
        yield found
    finally:  # a tensor with a graph left behind could not be copied or saved
        for gate in gates:
            gate._record = None
