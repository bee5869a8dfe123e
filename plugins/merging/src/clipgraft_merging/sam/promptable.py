"""SAM's prompt encoder and mask decoder at any grid, with prompts of every kind per object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clipgraft.errors import InputError

BACKGROUND, FOREGROUND, NO_POINT = 0, 1, -1
"""Labels of point prompts; ``NO_POINT`` fills rows of prompts with fewer points."""


@dataclass(frozen=True, slots=True)
class Masks:
    """``logits`` (B, P, M, 4h, 4w), a mask where positive; ``iou`` (B, P, M), the decoder's guess of each one's IoU."""

    logits: Tensor
    iou: Tensor

    def best(self) -> Tensor:
        """(B, P, 4h, 4w): per prompt the logits of the mask with the highest guessed IoU."""
        at = self.iou.argmax(-1)[..., None, None, None].expand(-1, -1, 1, *self.logits.shape[-2:])
        return self.logits.gather(2, at)[:, :, 0]


class Promptable(nn.Module):
    """transformers' ``SamPromptEncoder`` and ``SamMaskDecoder``, whose weights keep their names.

    Every prompt becomes a row of the decoder's batch, so that each may bring a mask of its own; transformers' decoder
    adds masks before it repeats the image and fails then.
    """

    def __init__(self, prompt_encoder: Any, mask_decoder: Any) -> None:
        super().__init__()
        self.prompt_encoder, self.mask_decoder = prompt_encoder, mask_decoder
        self.native = int(prompt_encoder.input_image_size)
        self.patch = self.native // int(prompt_encoder.image_embedding_size[0])
        self.multimasks = int(mask_decoder.num_multimask_outputs)

    def masks(
        self,
        features: Tensor,
        points: Tensor | None = None,
        labels: Tensor | None = None,
        boxes: Tensor | None = None,
        mask_prompts: Tensor | None = None,
        *,
        multimask: bool = True,
    ) -> Masks:
        """Neck features (B, C, h, w) and prompts -> masks.

        ``points`` (B, P, k, 2) are x, y in pixels of the image that the tower saw, (h * patch) x (w * patch), with
        ``labels`` (B, P, k): 1 on the object, 0 beside it, -1 no point. ``boxes`` (B, P, 4) are x0, y0, x1, y1.
        ``mask_prompts`` (B, P, 4h, 4w) are logits. Any of them may be None, not all. ``multimask``: three masks per
        prompt, for prompts that may mean several objects; else one.
        """
        b, _, h, w = features.shape
        count = self._checked(features, points, labels, boxes, mask_prompts)
        sparse = self._sparse(points, labels, boxes, (h, w))
        if sparse is None:
            sparse = features.new_zeros(b * count, 1, 0, features.shape[1])
        if mask_prompts is None:
            dense = self.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(b * count, -1, h, w)
        else:
            dense = self.prompt_encoder.mask_embed(mask_prompts.reshape(b * count, 1, 4 * h, 4 * w))
        logits, iou = self.mask_decoder(
            image_embeddings=features.repeat_interleave(count, 0),
            image_positional_embeddings=self.places(h, w).expand(b * count, -1, -1, -1),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
        )[:2]
        return Masks(logits.reshape(b, count, -1, *logits.shape[-2:]), iou.reshape(b, count, -1))

    def places(self, h: int, w: int) -> Tensor:
        """(1, C, h, w): the positional encoding of every cell's centre."""
        table = self.prompt_encoder.shared_embedding.positional_embedding
        y = (torch.arange(h, device=table.device, dtype=table.dtype) + 0.5) / h
        x = (torch.arange(w, device=table.device, dtype=table.dtype) + 0.5) / w
        at = torch.stack([x.expand(h, w), y[:, None].expand(h, w)], -1)
        return self.prompt_encoder.shared_embedding(at).permute(2, 0, 1)[None]  # type: ignore[no-any-return]

    def _checked(
        self,
        features: Tensor,
        points: Tensor | None,
        labels: Tensor | None,
        boxes: Tensor | None,
        mask_prompts: Tensor | None,
    ) -> int:
        """P, the prompts per image."""
        b, _, h, w = features.shape
        given = [x for x in (points, boxes, mask_prompts) if x is not None]
        if not given:
            raise InputError("no prompt was given; give points with labels, boxes, or masks")
        if (points is None) != (labels is None):
            raise InputError("points and labels belong together; give both or neither")
        if len({tuple(x.shape[:2]) for x in given}) > 1 or len(given[0]) != b:
            shapes = ", ".join(str(tuple(x.shape[:2])) for x in given)
            raise InputError(f"prompts must agree in (images, prompts) and with {b} images; got {shapes}")
        if mask_prompts is not None and tuple(mask_prompts.shape[2:]) != (4 * h, 4 * w):
            raise InputError(
                f"a mask prompt for a grid of {h} x {w} has {4 * h} x {4 * w} values, got "
                f"{' x '.join(str(n) for n in mask_prompts.shape[2:])}; resize it"
            )
        return given[0].shape[1]

    def _sparse(
        self, points: Tensor | None, labels: Tensor | None, boxes: Tensor | None, grid: tuple[int, int]
    ) -> Tensor | None:
        """(B*P, 1, k', C) of points and boxes; transformers' embeddings, of coordinates moved to the native image."""
        points = None if points is None else self._to_native(points.flatten(0, 1)[:, None], grid)
        labels = None if labels is None else labels.flatten(0, 1)[:, None]
        if boxes is not None:
            boxes = self._to_native(boxes.reshape(-1, 1, 2, 2), grid).reshape(-1, 1, 4)
        if points is None and boxes is None:
            return None
        return self.prompt_encoder(points, labels, boxes, None)[0]  # type: ignore[no-any-return]

    def _to_native(self, at: Tensor, grid: tuple[int, int]) -> Tensor:
        """Coordinates (..., 2) in pixels of an image on ``grid`` -> of the prompt encoder's own image."""
        sides = (grid[1] * self.patch, grid[0] * self.patch)
        at = at.to(self.prompt_encoder.shared_embedding.positional_embedding.dtype)
        if sides == (self.native, self.native):
            return at
        scale = at.new_tensor([self.native / side for side in sides])
        return (at + 0.5) * scale - 0.5
