"""Settings of ``llm/reinforce``."""

from __future__ import annotations

from pydantic import Field

from clipgraft.config.schema import LossNode, LossRef
from clipgraft.finetune import FinetuneConfig


class ReinforceConfig(FinetuneConfig):
    """``llm/reinforce``."""

    store: str = Field(description="folder that clipgraft llm reinforce-data wrote of the same data")
    losses: tuple[LossRef, ...] = Field(
        (LossNode(use="llm/reinforced"),),
        min_length=1,
        description="losses by name; llm/reinforced takes dims, and scales if it has none, from the store",
    )
