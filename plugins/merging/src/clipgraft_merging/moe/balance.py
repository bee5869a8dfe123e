"""The balance loss: tokens should be spread over the experts. B samples, M mixtures, E experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clipgraft_merging.moe.mixture import Routing

Compat = Literal["paper", "official"]


def shares(routings: Sequence[Routing], *, compat: Compat = "paper") -> tuple[Tensor, Tensor]:
    """Per sample and mixture, both (B, M, E): the gate's mean probability, and the share of tokens that go there.

    ``paper``: a token goes to its first choice. ``official``: it goes to all of its k experts, so shares sum to k.
    """
    probabilities = torch.stack([r.probabilities.mean(1) for r in routings], 1)
    experts, slots = probabilities.shape[-1], 1 if compat == "paper" else None
    chosen = [F.one_hot(r.chosen[..., :slots], experts).to(probabilities.dtype).sum(-2).mean(1) for r in routings]
    return probabilities, torch.stack(chosen, 1).detach()


def balance(probabilities: Tensor, chosen: Tensor, *, compat: Compat = "paper") -> Tensor:
    """(B, M, E) each of one tower -> scalar: E * sum_e f_e P_e, f the share of tokens and P the mean probability.

    ``paper``: computed per mixture, then averaged; 1 when balanced, E when every mixture has collapsed onto an expert.
    ``official``: all mixtures are pooled first, so that mixtures which collapse onto different experts look balanced
    and get no gradient; k when balanced.
    """
    experts = probabilities.shape[-1]
    if compat == "official":
        return experts * (probabilities.mean((0, 1)) * chosen.mean((0, 1))).sum()
    return experts * (probabilities.mean(0) * chosen.mean(0)).sum(-1).mean()
