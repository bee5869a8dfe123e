"""EZ-CLIP's motion loss: frames of a video should differ, from their neighbours and from their mean."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clipgraft.distributed import gather_with_grad
from clipgraft_video.stage import Seen


def motion_loss(frames: Tensor) -> Tensor:
    """Raw frame features (B, T, D) -> 1 / (C + V + 1).

    C is the mean of |z_(t+1) - z_(t-1)| / 2 with the ends repeated, V the mean variance over T (unbiased), both over
    the videos of all ranks, because they stand in a denominator. A still clip gives exactly 1.
    """
    ahead = torch.cat([frames[:, 1:], frames[:, -1:]], 1)
    behind = torch.cat([frames[:, :1], frames[:, :-1]], 1)
    central = ((ahead - behind) / 2).abs().mean()
    spread = frames.var(1).mean() if frames.shape[1] > 1 else frames.new_zeros(())
    central, spread = (gather_with_grad(x[None]).mean() for x in (central, spread))
    return 1 / (central + spread + 1)


class Motion(nn.Module):
    """``motion_loss`` of what a step saw."""

    def forward(self, seen: Seen) -> dict[str, Tensor]:
        """Scalar loss."""
        return {"loss": motion_loss(seen.video.frames.float())}
