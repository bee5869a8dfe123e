"""The cross-attention condition: visual tokens projected into a text encoder's space, beside a constant prompt."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Combine = Literal["add", "mean-add", "none"]


class CrossCondition(nn.Module):
    """Visual tokens (B, L, D) -> condition (B, L, width) through one linear layer, ``nn.Linear``'s random start.

    ``add``: the prompt's L states, position by position (OpenAI's backbones). ``mean-add``: their mean, the same vector
    everywhere (all others). ``none``: no prompt. ``unit`` normalises the tokens first; the paper doesn't.
    """

    def __init__(
        self, embed_dim: int, width: int, *, prompt: Tensor | None, combine: Combine = "mean-add", unit: bool = False
    ) -> None:
        super().__init__()
        self.project, self.unit = nn.Linear(embed_dim, width), unit
        self.prompt: Tensor | None
        states = None if prompt is None or combine == "none" else prompt.detach().clone()
        self.register_buffer(
            "prompt", states.mean(1, keepdim=True) if states is not None and combine == "mean-add" else states, False
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, width)."""
        told: Tensor = self.project(F.normalize(tokens, dim=-1) if self.unit else tokens)
        return told if self.prompt is None else told + self.prompt


@torch.no_grad()
def fit_projection(layer: nn.Linear, *, told: Tensor, wanted: Tensor, seen: Tensor, ridge: float = 1e-4) -> float:
    """Set ``layer`` so that CLIP's texts land where the generator's own text tower puts them; returns R squared.

    ``told`` (n, D) and ``wanted`` (n, width) are the embeddings of the same texts in CLIP and in the generator's space;
    a least-squares map of their deviations from the mean, with a ridge relative to the texts' mean variance. The bias
    sends the mean image embedding ``seen`` (m, D) to the mean text: images and texts of a CLIP lie apart.
    Deviation: the paper starts from a random layer. A miniature's few hundred steps can't learn one and teach the tower
    beside it; real text encoders that are told a bag of visual tokens leave nothing to fit.
    """
    x, y = told.double() - told.double().mean(0), wanted.double() - wanted.double().mean(0)
    gram = x.T @ x
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    weight = torch.linalg.solve(gram + ridge * gram.diagonal().mean() * eye, x.T @ y)  # (D, width)
    layer.weight.copy_(weight.T)
    layer.bias.copy_(wanted.double().mean(0) - seen.double().mean(0) @ weight)
    return float(1 - (y - x @ weight).square().sum() / y.square().sum())
