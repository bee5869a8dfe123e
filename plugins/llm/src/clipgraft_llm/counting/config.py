"""Settings of ``llm/count-to-ten``."""

from __future__ import annotations

from pydantic import Field

from clipgraft.config.schema import Config, LossNode, LossRef
from clipgraft.finetune import FinetuneConfig


class CountingConfig(Config):
    """Which samples count, and how often they are shown."""

    share: float = Field(1 / 32, gt=0, le=1, description="of an epoch from captions with one number, exact")
    verified: str | None = Field(
        None, description="file of sample ids, one per line, on which a detector found that many; null trusts captions"
    )
    per_caption: int = Field(1, gt=0, le=8, description="other numbers for each caption, drawn anew in every epoch")


class CountRunConfig(FinetuneConfig):
    """``llm/count-to-ten``."""

    counting: CountingConfig = CountingConfig()
    losses: tuple[LossRef, ...] = Field(
        (LossNode(use="core/clip"), LossNode(use="llm/count")),
        min_length=1,
        description="losses by name; their weights are in loss_weights",
    )
    crop: tuple[float, float] | None = Field(
        (0.9, 1.0), description="area range of the random crop of training images; null takes the whole image"
    )
