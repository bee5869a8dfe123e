"""Settings of ``llm/clip-refine``."""

from __future__ import annotations

from pydantic import Field

from clipgraft.config.schema import LossNode, LossRef
from clipgraft.finetune import FinetuneConfig


class RefineConfig(FinetuneConfig):
    """``llm/clip-refine``."""

    losses: tuple[LossRef, ...] = Field(
        (LossNode(use="llm/rafa"), LossNode(use="llm/hycd")),
        min_length=1,
        description="losses by name; their weights are in loss_weights",
    )
    teacher: str | None = Field("base", description="model reference of the frozen teacher; base: the untouched model")
    crop: tuple[float, float] | None = Field(
        None,
        description="area range of the random crop of training images; null takes the whole image, as in the paper",
    )
