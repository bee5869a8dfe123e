"""Stage 1's objective: a query's own positive against all positives and negatives (LLM2CLIP, section 3.2; LLM2Vec).

B pairs on this rank, W ranks, V features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from clipgraft.losses.base import gathered_unit


def hard_negative_nll(query: Tensor, positive: Tensor, negative: Tensor | None, *, scale: float) -> dict[str, Tensor]:
    """(B, V) each, any length -> "loss", one direction only, and "accuracy" of the own positive being the nearest.

    Rows are gathered from all ranks with gradient, so that every rank has the loss of the whole batch. Without
    ``negative`` the other positives are all there is.
    """
    q, others = gathered_unit(query), [gathered_unit(positive)]
    others += [] if negative is None else [gathered_unit(negative)]
    scores = scale * q @ torch.cat(others).T  # (W*B, W*B) or (W*B, 2*W*B)
    own = torch.arange(len(q), device=q.device)
    accuracy = (scores.detach().argmax(1) == own).float().mean()
    return {"loss": F.cross_entropy(scores, own), "accuracy": accuracy}
