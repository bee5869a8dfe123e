"""The counting loss: a caption against itself with another number (Paiss et al., Teaching CLIP to Count to Ten,

ICCV 2023, arXiv 2302.12066, eq. 2). n counting pictures, K changed captions each, D joint space.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from clipgraft.config.schema import Config
from clipgraft.distributed import gather_with_grad
from clipgraft.losses.base import Loss, LossInputs
from clipgraft_llm.named_losses import needed


def count_loss(own: Tensor, other: Tensor, *, scale: Tensor | float = 1.0) -> Tensor:
    """Cosines of pictures with their caption and with the changed one, (n,) each -> (n,).

    -log of the softmax of the two: softplus of their difference, ln 2 where they are alike.
    """
    return F.softplus(scale * (other - own))


class CountConfig(Config):
    """Settings of ``llm/count``."""

    scale: float | None = Field(
        1.0, gt=0, description="of the two cosines; 1 as in the paper stays near ln 2, null takes the model's own"
    )


class CountLoss(Loss):
    """Mean over the changed captions of the global batch; 0 where a batch has none."""

    reduction = "global"

    def __init__(self, *, scale: float | None = 1.0) -> None:
        super().__init__()
        self.scale, self.needs_scale = scale, scale is None

    def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        """The loss, and the share of changed captions that the picture likes less than its own."""
        image, text = (F.normalize(inputs.need(name), dim=-1) for name in ("image", "text"))
        changed = F.normalize(needed(inputs, "negatives"), dim=-1)  # (B, K, D)
        own, other = (image * text).sum(-1), torch.einsum("bd,bkd->bk", image, changed)
        scale = inputs.need("logit_scale") if self.scale is None else self.scale
        values = count_loss(own[:, None].expand_as(other), other, scale=scale)
        # (W*B, K) of all ranks: the mean over counting pictures isn't the mean of the ranks' means
        values, present = gather_with_grad(values), gather_with_grad(needed(inputs, "present").float())
        right = gather_with_grad((own[:, None] > other).float())
        many = present.sum().clamp(min=1)
        return {"loss": (values * present).sum() / many, "right": (right * present).sum().detach() / many}
