"""What must not change: the zero-shot decisions of the untouched base, or its embeddings.

Deviation: the paper has no such term (its weight is 0 in the paper's presets). A miniature has a few hundred thousand
parameters and loses zero-shot within a hundred steps without it; successors report losses for the released weights too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Anchor(nn.Module):
    """KL of zero-shot class probabilities against the base, or 1 - cosine of embeddings when there are no classes.

    ``classes`` (K, D) of unit length from the untouched text tower; ``temperature`` multiplies the base's cosines.
    With ``learn_temperature`` the student has its own, so the anchor keeps the order of classes, not the confidence.
    """

    def __init__(self, classes: Tensor | None, *, temperature: float = 100.0, learn_temperature: bool = False) -> None:
        super().__init__()
        self.classes: Tensor | None
        self.register_buffer("classes", classes, persistent=False)
        self.temperature = temperature
        start = torch.tensor(float(temperature)).log()
        self.log_temperature = nn.Parameter(start) if learn_temperature and classes is not None else None

    def forward(self, z: Tensor, base: Tensor) -> Tensor:
        """Embeddings of the student and of the base, both (B, D), not normalised -> scalar."""
        student, teacher = F.normalize(z.float(), dim=-1), F.normalize(base.detach().float(), dim=-1)
        if self.classes is None:
            return (1 - (student * teacher).sum(-1)).mean()
        scale = self.temperature if self.log_temperature is None else self.log_temperature.exp()
        wanted = F.log_softmax(self.temperature * teacher @ self.classes.T, dim=-1)
        given = F.log_softmax(scale * student @ self.classes.T, dim=-1)
        return F.kl_div(given, wanted, log_target=True, reduction="batchmean")
