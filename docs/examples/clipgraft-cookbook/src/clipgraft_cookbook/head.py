"""A linear change of embeddings, x + A x, that starts as none."""

from pydantic import Field
from torch import Tensor, nn

from clipgraft.config.schema import Config


class ResidualConfig(Config):
    """Settings of the head."""

    dim: int = Field(gt=0, description="width D of the embeddings")


class Residual(nn.Module):
    """(B, D) -> (B, D)."""

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.change = nn.Linear(dim, dim, bias=False)
        nn.init.zeros_(self.change.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings of any length; they are not normalised."""
        return x + self.change(x)
