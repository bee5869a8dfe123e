"""What lies between a language model's features and the joint space (LLM2CLIP, section 3.3).

B texts, V features of the language model, D joint embedding.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class ResidualBlock(nn.Module):
    """x + W2 GELU(W1 LN(x)), (B, V) -> (B, V); W1 doubles the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.widen, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, V) -> (B, V)."""
        step: Tensor = self.narrow(F.gelu(self.widen(self.norm(x))))
        return x + step


class TextProj(nn.Module):
    """Residual blocks, a norm and a linear map: features (B, V) -> (B, D), not normalised.

    Without blocks it is the linear map alone. ``input_norm`` makes features of length one first. Official code
    does that on cached features and not on those computed on the fly; here it belongs to the projection, so that both
    ways are one function.
    """

    def __init__(self, width: int, embed_dim: int, *, blocks: int = 4, input_norm: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = [ResidualBlock(width) for _ in range(blocks)]
        layers += [nn.LayerNorm(width)] if blocks else []
        self.layers = nn.Sequential(*layers, nn.Linear(width, embed_dim))
        self.input_norm = input_norm

    def forward(self, x: Tensor) -> Tensor:
        """(B, V) -> (B, D)."""
        found: Tensor = self.layers(F.normalize(x, dim=-1) if self.input_norm else x)
        return found
