"""Pairwise sigmoid loss over all pairs of the global batch (Zhai et al. 2023, arXiv 2303.15343, eq. 1)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from clipgraft.losses.base import Loss, LossInputs, gathered_unit


class SigLipLoss(Loss):
    """Every pair is a yes-or-no question; a model without ``logit_bias`` is asked with a bias of 0."""

    batch_coupled = True
    reduction = "global"
    needs_scale = True
    needs_bias = True

    def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Summed over texts, mean over images; split into the pairs that belong together and those that don't."""
        image, text = gathered_unit(inputs.need("image")), gathered_unit(inputs.need("text"))
        logits = inputs.need("logit_scale") * image @ text.T  # (W*B, W*B)
        logits = logits if inputs.logit_bias is None else logits + inputs.need("logit_bias")
        own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        losses = -F.logsigmoid(torch.where(own, logits, -logits))
        matching, others = losses.diagonal().mean(), losses.masked_fill(own, 0).sum() / len(losses)
        return {"loss": matching + others, "matching": matching, "others": others}
