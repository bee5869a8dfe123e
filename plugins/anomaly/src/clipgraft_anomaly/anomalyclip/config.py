"""Settings of ``anomaly/anomalyclip``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from clipgraft.config.schema import Config, RunConfig, TrainConfig
from clipgraft_anomaly.anomalyclip.prompts import PromptConfig
from clipgraft_anomaly.feature_store import Keep
from clipgraft_anomaly.reading import ReadConfig


class CacheConfig(Config):
    """Features of the frozen tower, computed once."""

    keep: Keep = Field(
        "auto", description="auto: in memory up to 2 GiB, else on disk; none: compute them in every step"
    )
    dtype: Literal["fp32", "fp16"] = Field("fp32", description="fp16 halves the room and is not exact")
    batch_size: int = Field(8, gt=0, description="pictures per forward pass of the tower")


class LossConfig(Config):
    """What is minimised."""

    local: float = Field(
        4.0, ge=0, description="of the maps' focal and Dice losses, beside the picture's cross entropy"
    )


class AnomalyClipRunConfig(RunConfig):
    """``anomaly/anomalyclip``."""

    prompt: PromptConfig = PromptConfig()
    read: ReadConfig = ReadConfig()
    loss: LossConfig = LossConfig()
    cache: CacheConfig = CacheConfig()
    train: TrainConfig
