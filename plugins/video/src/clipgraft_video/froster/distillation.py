"""Residual feature distillation: stay close to the frozen CLIP through a projection that starts as the identity."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft_video.model import VideoModel
from clipgraft_video.stage import Seen


class ResidualProjection(nn.Module):
    """f + scale * W2 gelu(W1 f), no bias, W2 zero at first: (..., D) -> (..., D)."""

    def __init__(self, dim: int, *, scale: float = 0.1) -> None:
        super().__init__()
        self.scale = scale
        self.w1, self.w2 = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        nn.init.kaiming_normal_(self.w1.weight)
        nn.init.zeros_(self.w2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The identity as long as W2 is zero."""
        return x + self.scale * self.w2(F.gelu(self.w1(x)))


class ResidualDistillation(nn.Module):
    """(1 - cos(f~, f_teacher)) + (1 - cos(t~, t_teacher)) over frames and texts; f~, t~ are projected student features.

    ``teacher`` is the untouched CLIP on the same frames and texts, frozen by whoever owns this. Both projections serve
    this term alone and are thrown away. ``residual`` false compares the features themselves.
    """

    def __init__(self, teacher: VideoModel, dim: int, *, scale: float = 0.1, residual: bool = True) -> None:
        super().__init__()
        self.teacher = teacher
        self.image = ResidualProjection(dim, scale=scale) if residual else nn.Identity()
        self.text = ResidualProjection(dim, scale=scale) if residual else nn.Identity()

    def forward(self, seen: Seen) -> dict[str, Tensor]:
        """Scalars loss, image and text."""
        with torch.no_grad():
            frames = self.teacher(seen.clips).frames
            texts = self.teacher.texts(list(seen.chosen)) if seen.chosen else None
        own = F.normalize(seen.video.frames, dim=-1)  # the student's, of length one, then projected
        image = (1 - F.cosine_similarity(self.image(own).float(), frames.float(), dim=-1)).mean()
        if texts is None or seen.texts is None:
            return {"loss": image, "image": image.detach()}
        text = (1 - F.cosine_similarity(self.text(seen.texts).float(), texts, dim=-1)).mean()
        return {"loss": image + text, "image": image.detach(), "text": text.detach()}
