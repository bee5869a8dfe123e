"""Symmetric InfoNCE over all pairs of the global batch (Radford et al. 2021, arXiv 2103.00020, figure 3)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from clipgraft.losses.base import Loss, LossInputs, gathered_unit


class ClipLoss(Loss):
    """Image i belongs to text i and to no other one."""

    batch_coupled = True
    reduction = "global"
    needs_scale = True

    def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Mean cross-entropy of both directions, and each."""
        image, text = gathered_unit(inputs.need("image")), gathered_unit(inputs.need("text"))
        logits = inputs.need("logit_scale") * image @ text.T  # (W*B, W*B); a bias would cancel in the softmax
        own = torch.arange(len(logits), device=logits.device)
        to_text, to_image = F.cross_entropy(logits, own), F.cross_entropy(logits.T, own)
        return {"loss": (to_text + to_image) / 2, "image_to_text": to_text, "text_to_image": to_image}
