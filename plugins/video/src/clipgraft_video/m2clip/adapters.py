"""M2-CLIP's adapters: a convolution over frames, the difference to the frame before, and a plain one for texts.

Wang et al., M2-CLIP: A Multimodal, Multi-task Adapting Framework for Video Action Recognition, AAAI 2024, arXiv
2401.11649. All are bottlenecks: W -> C -> W.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft.errors import InputError


class Bottleneck(nn.Module):
    """``fc1``, a depthwise convolution that is zero at first, ``fc2``: zero at first, whatever comes in."""

    def __init__(self, width: int, hidden: int, conv: nn.Conv1d | nn.Conv2d) -> None:
        super().__init__()
        self.fc1, self.conv, self.fc2 = nn.Linear(width, hidden), conv, nn.Linear(hidden, width)
        for zero in (self.conv.weight, self.conv.bias, self.fc1.bias, self.fc2.bias):
            if zero is not None:
                nn.init.zeros_(zero)


class OverFrames(Bottleneck):
    """Every token of a place over T: (B, T, L, W) -> (B, T, L, W), ``kernel`` frames wide; no activation."""

    def __init__(self, width: int, hidden: int, kernel: int) -> None:
        conv = nn.Conv2d(hidden, hidden, (kernel, 1), padding=(kernel // 2, 0), groups=hidden)
        super().__init__(width, hidden, conv)

    def forward(self, x: Tensor) -> Tensor:
        """Beyond the ends of a clip lie zeros."""
        return self.fc2(self.conv(self.fc1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1))  # type: ignore[no-any-return]


class Difference(Bottleneck):
    """What changed since the frame before, over places: patches (B, T, N, W) -> (B, T, N, W); the first has no change.

    ``grid`` (h, w) with h*w == N; the convolution is 3 x 3.
    """

    def __init__(self, width: int, hidden: int, grid: tuple[int, int]) -> None:
        super().__init__(width, hidden, nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden))
        self.grid = grid

    def forward(self, patches: Tensor) -> Tensor:
        """Zero on a still clip while the biases are zero."""
        change = self.fc1(patches - torch.cat([patches[:, :1], patches[:, :-1]], 1))
        seen = self.conv(change.flatten(0, 1).unflatten(1, self.grid).permute(0, 3, 1, 2))
        return self.fc2(seen.permute(0, 2, 3, 1)).reshape(patches.shape)  # type: ignore[no-any-return]


class TedAdapter(nn.Module):
    """Temporal enhancement and difference: x + over frames + (patches only) difference; the identity at first.

    The class token never receives the difference.
    """

    def __init__(self, width: int, hidden: int, *, grid: tuple[int, int], kernel: int = 3, difference: bool = True):
        super().__init__()
        self.over_frames = OverFrames(width, hidden, kernel)
        self.difference = Difference(width, hidden, grid) if difference else None
        self.patches = grid[0] * grid[1]

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, 1 + N, W) -> the same; ``x`` itself stays as it is."""
        if x.shape[2] != 1 + self.patches:
            raise InputError(
                f"this tower was adapted for {self.patches} patches and a class token, got {x.shape[2]} tokens; switch "
                "patch dropout off, or resize positions before the graft"
            )
        out = x + self.over_frames(x)
        return out if self.difference is None else out + F.pad(self.difference(x[:, :, 1:]), (0, 0, 1, 0))


class TemporalAdapter(Bottleneck):
    """The same idea for embeddings of frames: x + fc2 conv fc1 x, (B, T, D) -> (B, T, D), hidden width D / 2."""

    def __init__(self, dim: int, kernel: int = 3) -> None:
        hidden = dim // 2
        super().__init__(dim, hidden, nn.Conv1d(hidden, hidden, kernel, padding=kernel // 2, groups=hidden))

    def forward(self, frames: Tensor) -> Tensor:
        """The identity at first."""
        return frames + self.fc2(self.conv(self.fc1(frames).transpose(1, 2)).transpose(1, 2))  # type: ignore[no-any-return]


class TextAdapter(nn.Module):
    """x + fc2 gelu fc1 x: (..., W) -> (..., W). Not the identity at first: only its biases start at zero."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        nn.init.zeros_(self.fc1.bias)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        """-> (..., W)."""
        return x + self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]
