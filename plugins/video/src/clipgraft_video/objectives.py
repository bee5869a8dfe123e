"""What a video model is trained for: the right one of all classes, or the right caption in the batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from clipgraft.distributed import gather_with_grad


def caption_contrast(videos: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """Unit (B, D), unit (B, D), () -> (): symmetric cross entropy over the pairs of all ranks."""
    everything, every_text = gather_with_grad(videos), gather_with_grad(texts)
    logits = scale * everything @ every_text.T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def label_contrast(videos: Tensor, classes: Tensor, labels: Tensor, *, scale: Tensor) -> Tensor:
    """In-batch contrast where several videos share a class: the mean of KL(rows) and KL(columns) over all ranks.

    Unit ``videos`` (B, D), unit texts of ``classes`` (K, D), ``labels`` (B,), ``scale`` (). Row i of the target is
    softmax(10 [label_i = label_j]) over the samples j (ActionCLIP; EZ-CLIP and M2-CLIP use it).
    """
    with torch.autocast(videos.device.type, enabled=False):
        everything, texts = gather_with_grad(videos.float()), gather_with_grad(classes[labels].float())
        every = gather_with_grad(labels.float()).long()  # class numbers are exact in fp32
        target = (10 * (every[:, None] == every[None]).float()).softmax(-1)
        logits = scale * everything @ texts.T
        parts = [F.kl_div(x.log_softmax(-1), target, reduction="batchmean") for x in (logits, logits.T)]
        return torch.stack(parts).mean()
