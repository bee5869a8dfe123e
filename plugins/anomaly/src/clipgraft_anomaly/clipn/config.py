"""Settings of ``anomaly/clipn``."""

from __future__ import annotations

from pydantic import Field

from clipgraft.config.schema import Config, RunConfig, TrainConfig
from clipgraft_anomaly.clipn.branch import NoConfig


class LossWeights(Config):
    """What is minimised."""

    binary: float = Field(0.5, ge=0, description="of the image-text binary-opposite loss, of either half")
    semantic: float = Field(0.5, ge=0, description="of the text semantic-opposite loss")


class ClipnRunConfig(RunConfig):
    """``anomaly/clipn``."""

    no: NoConfig = NoConfig()
    loss: LossWeights = LossWeights()
    scale: float = Field(100.0, gt=0, description="of cosines when judging; training takes the model's own")
    shuffled: bool = Field(False, description="a control: every picture gets the caption of another one of its batch")
    train: TrainConfig
