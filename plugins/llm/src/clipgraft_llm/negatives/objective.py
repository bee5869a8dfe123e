"""NegCLIP's loss: wrong captions are further columns of the image-to-text softmax (Yuksekgonul et al., ICLR 2023,

arXiv 2210.01936, section 4). B pictures of this rank, G = W*B of all W ranks, K wrong captions each, D joint space.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from clipgraft.distributed import gather_with_grad
from clipgraft.errors import ClipgraftError
from clipgraft.losses.base import Loss, LossInputs, gathered_unit
from clipgraft_llm.named_losses import needed


def negclip_loss(
    image: Tensor, text: Tensor, negatives: Tensor, *, scale: Tensor | float, present: Tensor | None = None
) -> dict[str, Tensor]:
    """Unit ``image`` and ``text`` (G, D), unit ``negatives`` (M, D) with ``present`` (M,) bool -> scalars.

    Rows of the image-to-text half see G + M captions, the text-to-image half only the G right ones: nothing asks which
    picture a wrong caption belongs to. Without negatives, or with none present, it is CLIP's loss.
    """
    if len(image) != len(text):
        raise ClipgraftError(f"NegCLIP pairs pictures and captions: got {len(image)} and {len(text)}")
    own = torch.arange(len(image), device=image.device)
    matching = scale * image @ text.T  # (G, G)
    others = scale * image @ negatives.T  # (G, M)
    if present is not None:
        others = others.masked_fill(~present, -torch.inf)
    to_text = F.cross_entropy(torch.cat([matching, others], 1), own)
    to_image = F.cross_entropy(matching.T, own)
    return {"loss": (to_text + to_image) / 2, "image_to_text": to_text, "text_to_image": to_image}


class NegClipLoss(Loss):
    """CLIP's loss of the global batch with every rank's wrong captions as further columns."""

    batch_coupled = True
    reduction = "global"
    needs_scale = True

    def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Mean cross-entropy of both directions, and each."""
        image, text = gathered_unit(inputs.need("image")), gathered_unit(inputs.need("text"))
        negatives = gathered_unit(needed(inputs, "negatives").flatten(0, 1))  # (G*K, D)
        present = gather_with_grad(needed(inputs, "present").float()).flatten() > 0
        return negclip_loss(image, text, negatives, scale=inputs.need("logit_scale"), present=present)
