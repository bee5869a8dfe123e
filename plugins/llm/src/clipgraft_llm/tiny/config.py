"""Settings of ``llm/tinyclip``."""

from __future__ import annotations

from pydantic import Field

from clipgraft.config.schema import LossNode, LossRef
from clipgraft.finetune import FinetuneConfig
from clipgraft_llm.tiny.inheritance import Inherit


class TinyClipConfig(FinetuneConfig):
    """``llm/tinyclip``."""

    student: Inherit = Inherit()
    teacher: str | None = Field("base", description="model reference of the frozen teacher; base: the run's own model")
    losses: tuple[LossRef, ...] = Field(
        (LossNode(use="llm/affinity"),), min_length=1, description="losses by name; weights in loss_weights"
    )
