"""CLIP's loss with label smoothing."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from clipgraft.losses.base import Loss, LossInputs, gathered_unit


class SmoothedClipLoss(Loss):
    """Symmetric InfoNCE over the global batch whose target leaves a share ``smoothing`` to all texts alike."""

    batch_coupled = True
    reduction = "global"
    needs_scale = True

    def __init__(self, *, smoothing: float = 0.0) -> None:
        super().__init__()
        self.smoothing = smoothing

    def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Mean cross-entropy of both directions, and each."""
        image, text = gathered_unit(inputs.need("image")), gathered_unit(inputs.need("text"))
        logits = inputs.need("logit_scale") * image @ text.T  # (W*B, W*B)
        own = torch.arange(len(logits), device=logits.device)
        to_text, to_image = (F.cross_entropy(x, own, label_smoothing=self.smoothing) for x in (logits, logits.T))
        return {"loss": (to_text + to_image) / 2, "image_to_text": to_text, "text_to_image": to_image}
