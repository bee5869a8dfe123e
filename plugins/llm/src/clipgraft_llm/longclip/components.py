"""Primary component matching: images reduced to what matters most in their group (Long-CLIP, section 3.2).

B images of the global batch, D joint embedding, k components.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from clipgraft.losses.base import Loss, LossInputs, gathered_unit

GAP = 1e-6
"""Smallest gap of two variances that the gradient divides by, as a share of the largest variance."""


class _Leading(torch.autograd.Function):
    """(B, D) -> its projection on its k leading right singular vectors, with a gradient that stays finite.

    The gradient of torch's SVD divides by the gaps of all pairs of singular values and is NaN where two of them are
    equal, as the zeros of a small batch are. The projection only depends on the gaps between kept and dropped ones.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int) -> Tensor:
        wide = _wide(x)
        scatter = wide.T @ wide  # (D, D); twice the digits, since it squares the singular values
        values, vectors = torch.linalg.eigh(torch.nan_to_num(scatter))  # ascending; NaN stays in x, for the loss
        ctx.save_for_backward(x, values, vectors)
        ctx.count = count
        kept = vectors[:, -count:]
        return (wide @ kept @ kept.T).to(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        x, values, vectors = ctx.saved_tensors
        wide, gradient, kept = _wide(x), _wide(grads[0]), vectors[:, -ctx.count :]
        moved = vectors.T @ (wide.T @ gradient) @ vectors  # (D, D) in the basis of the vectors
        gaps = values[None, -ctx.count :] - values[: -ctx.count, None]  # (D - k, k), none negative
        shares = (moved + moved.T)[: -ctx.count, -ctx.count :] / gaps.clamp(min=GAP * _largest(values))
        turn = vectors[:, : -ctx.count] @ shares @ kept.T  # (D, D)
        return (gradient @ kept @ kept.T + wide @ (turn + turn.T)).to(x), None


def _wide(x: Tensor) -> Tensor:
    """``x`` in float64, which Apple's GPUs lack: there on the CPU."""
    return x.cpu().double() if x.device.type == "mps" else x.double()


def _largest(values: Tensor) -> Tensor:
    """The last of (D,) ascending values, above zero."""
    return values[-1].clamp(min=torch.finfo(values.dtype).tiny)


def primary_components(images: Tensor, *, count: int) -> Tensor:
    """(B, D) -> (B, D): the mean plus the projection of the rest on its ``count`` leading components, with gradient.

    Rows lose length and are not made unit again. At most B - 1 components exist: with ``count`` of B - 1 or more, or
    of D or more, the rows come back as they are (``inactive`` says so beforehand).
    """
    if count >= min(len(images) - 1, images.shape[1]):
        return images
    mean = images.mean(0, keepdim=True)
    return _Leading.apply(images - mean, count) + mean  # type: ignore[no-any-return]


def inactive(*, images: int, width: int, count: int) -> str:
    """Why ``count`` components of a group of ``images`` embeddings of ``width`` change nothing; empty if they do."""
    if count >= width:
        return f"{count} components of embeddings of width {width} are all there are; lower components"
    if count >= images - 1:
        return f"{images} images have {images - 1} components, fewer than the {count} kept and more; use larger groups"
    return ""


def grouped_components(images: Tensor, *, count: int | None, group: int | None) -> Tensor:
    """(B, D) -> (B, D), each run of ``group`` rows reduced by itself (None: all together); ``count`` None: as it is."""
    if count is None:
        return images
    parts = [images] if group is None else torch.split(images, group)
    return torch.cat([primary_components(part, count=count) for part in parts])


def matching(image: Tensor, text: Tensor, *, scale: Tensor | float, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of both directions of scale x (B, D) @ (B, D).T, rows taken as they are; labels smoothed."""
    logits = scale * image @ text.T
    own = torch.arange(len(logits), device=logits.device)
    return (
        F.cross_entropy(logits, own, label_smoothing=smoothing)
        + F.cross_entropy(logits.T, own, label_smoothing=smoothing)
    ) / 2


class Pcm(Loss):
    """Images reduced to their primary components against their captions, which should be short ones."""

    batch_coupled = True
    reduction = "global"
    needs_scale = True

    def __init__(self, *, components: int = 32, group: int | None = None, smoothing: float = 0.0) -> None:
        super().__init__()
        self.components, self.group, self.smoothing = components, group, smoothing

    def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        """The contrastive loss of reduced images; an error where the group is too small for the reduction to act."""
        from clipgraft.errors import InputError

        image, text = gathered_unit(inputs.need("image")), gathered_unit(inputs.need("text"))
        size = min(self.group or len(image), len(image))
        if problem := inactive(images=size, width=image.shape[1], count=self.components):
            raise InputError(f"llm/pcm: {problem} (train.batch_size, components, group)")
        reduced = grouped_components(image, count=self.components, group=self.group)
        return {"loss": matching(reduced, text, scale=inputs.need("logit_scale"), smoothing=self.smoothing)}
