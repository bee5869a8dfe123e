"""Settings of the run ``anomaly/genclip``; defaults are ours, none of the paper's numbers were known."""

from __future__ import annotations

from pydantic import Field

from clipgraft.config.schema import Config, RunConfig, TrainConfig
from clipgraft_anomaly.anomalyclip.config import CacheConfig
from clipgraft_anomaly.genclip.name_filter import FilterConfig
from clipgraft_anomaly.genclip.prompts import BlendConfig, QueryConfig
from clipgraft_anomaly.genclip.vision import LayeredReadConfig


class LossConfig(Config):
    """What is minimised: each branch's share times (cross entropy of pictures + ``local`` times focal and Dice)."""

    local: float = Field(1.0, ge=0, description="of focal and Dice losses, added up over layers")
    vision: float = Field(1.0, ge=0, description="of the vision-enhanced branch")
    query: float = Field(1.0, ge=0, description="of the query-only branch")


class GenClipRunConfig(RunConfig):
    """``anomaly/genclip``."""

    prompt: QueryConfig = QueryConfig()
    read: LayeredReadConfig = LayeredReadConfig()
    blend: BlendConfig = BlendConfig()
    filter: FilterConfig = FilterConfig()
    loss: LossConfig = LossConfig()
    cache: CacheConfig = CacheConfig()
    train: TrainConfig
