"""The two frozen teachers, each with its own preprocessing of the pixels that the student gets."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft.encoders.base import Encoder, Preprocess
from clipgraft_merging.sam.opening import SamParts
from clipgraft_merging.sam.promptable import Masks
from clipgraft_merging.samclip.prompts import Prompts, automatic_masks


def resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, 3, H, W') in [0, 1] -> (B, 3, *size), bicubic with antialiasing, back in [0, 1]; unchanged at that size."""
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    return F.interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


class ClipTeacher(nn.Module):
    """A CLIP's image tower: pixels (B, 3, H, W') in [0, 1] of any size -> (B, D)."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.image, self.preprocess = encoder.image, encoder.preprocess

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Resized to the tower's size and standardised as it was trained."""
        return self.image(self.preprocess.normalize(resized(pixels, self.preprocess.size))).pooled  # type: ignore[no-any-return]


class MaskTeacher(nn.Module):
    """The SAM that the student started from, as it was: pixels (B, 3, R, R) in [0, 1] at its native size."""

    def __init__(self, parts: SamParts, *, preprocess: Preprocess) -> None:
        super().__init__()
        self.tower, self.promptable, self.preprocess = parts.tower, parts.promptable, preprocess

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """(B, C, h, w), what the mask decoder reads."""
        return self.tower(self.preprocess.normalize(pixels))  # type: ignore[no-any-return]

    @torch.no_grad()
    def answers(self, features: Tensor, prompts: Prompts) -> tuple[Masks | None, Masks | None]:
        """Masks for the points and for the boxes of ``prompts``."""
        return answers(self.promptable, features, prompts)

    def automatic(self, features: Tensor, *, side: int, keep: int) -> Tensor:
        """(B, keep, 4h, 4w) masks of its own, for pictures without any."""
        return automatic_masks(self.promptable, features, side=side, keep=keep)


def answers(promptable: nn.Module, features: Tensor, prompts: Prompts) -> tuple[Masks | None, Masks | None]:
    """Several masks for every point, which may mean several objects, and one for every box; None without such."""
    points = boxes = None
    if prompts.points.shape[1]:
        points = promptable.masks(features, prompts.points, prompts.labels, multimask=True)  # type: ignore[operator]
    if prompts.boxes.shape[1]:
        boxes = promptable.masks(features, boxes=prompts.boxes, multimask=False)  # type: ignore[operator]
    return points, boxes
