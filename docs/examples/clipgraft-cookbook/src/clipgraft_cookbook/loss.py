"""VSE++: only the hardest wrong caption of an image, and image of a caption, count.

Faghri et al., VSE++: Improving Visual-Semantic Embeddings with Hard Negatives, BMVC 2018, arXiv 1707.05612, equation 6.
"""

import torch
from pydantic import Field

from clipgraft.config.schema import Config
from clipgraft.losses.base import Loss, LossInputs, gathered_unit


class HardestConfig(Config):
    """Settings of the loss."""

    margin: float = Field(0.2, ge=0, description="how much closer the right pair has to be [cosine]")


class Hardest(Loss):
    """max(0, margin + s(i, wrong c) - s(i, c)) for the nearest wrong c, and the same for captions; mean over pairs."""

    batch_coupled = True  # rows are contrasted with each other,
    reduction = "global"  # those of all processes with each other

    def __init__(self, *, margin: float = 0.2) -> None:
        super().__init__()
        self.margin = margin

    def terms(self, inputs: LossInputs) -> dict[str, torch.Tensor]:
        """Scalars by name, "loss" among them."""
        image, text = gathered_unit(inputs.need("image")), gathered_unit(inputs.need("text"))  # (W*B, D)
        scores = image @ text.T  # (W*B, W*B)
        right = scores.diagonal()
        wrong = scores.masked_fill(torch.eye(len(scores), dtype=torch.bool, device=scores.device), float("-inf"))
        captions = (self.margin + wrong.amax(1) - right).clamp(min=0).mean()
        images = (self.margin + wrong.amax(0) - right).clamp(min=0).mean()
        return {"loss": captions + images, "captions": captions, "images": images}
