"""CLIPN's two losses: image-text binary-opposite and text semantic-opposite (Wang et al., ICCV 2023, section 3.3).

N pictures and captions of the global batch, D joint embedding; all embeddings have length one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-4
"""Below the root of the distance, so that its gradient stays finite (official code)."""


@dataclass(frozen=True, slots=True)
class Opposite:
    """Scalars: ``match`` and ``mismatch`` are the two halves of the binary-opposite loss, ``semantic`` is the other."""

    match: Tensor
    mismatch: Tensor
    semantic: Tensor


def opposite(image: Tensor, text: Tensor, no: Tensor, *, scale: Tensor | float) -> Opposite:
    """Three times (N, D) -> losses.

    The chance that picture i and caption j belong together is sigmoid(d_ij), with d_ij = scale (I_i T_j - I_i T~_j):
    ordinary text against "no" text. ``match`` is the mean of -log of it over own captions, ``mismatch`` that of
    -log(1 - it) over the others' (of which a batch of one has none: 0). ``semantic`` is the mean of 2 - |T_i - T~_i|,
    in [0, 2]. Deviation: softplus takes the place of softmax and logarithm, which overflow in 16 bits.
    """
    d = scale * (image @ text.T - image @ no.T)  # (N, N)
    n, own = len(d), torch.eye(len(d), dtype=torch.bool, device=d.device)
    mismatch = F.softplus(d).masked_fill(own, 0).sum() / max(n * n - n, 1)
    apart = ((text - no).square().sum(-1) + EPS).sqrt()
    return Opposite(F.softplus(-d.diagonal()).mean(), mismatch, (2 - apart).mean())
