"""Settings of ``llm/long-clip``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from clipgraft.config.schema import Config, RunConfig, TrainConfig

_GROUP = "images that share one set of components, 128 in the paper (a GPU's batch); null: the whole batch [images]"


class PcmLossConfig(Config):
    """Settings of the loss ``llm/pcm``."""

    components: int = Field(32, gt=0, description="leading directions that are kept of a group of image embeddings")
    group: int | None = Field(None, gt=1, description=_GROUP)
    smoothing: float = Field(0.0, ge=0, lt=1, description="of labels")


class PcmConfig(Config):
    """Primary component matching: reduced images against short captions."""

    weight: float = Field(1.0, ge=0, description="of the short captions' loss, 0 leaves it out; 0.1 before May 2024")
    components: int | None = Field(
        32, gt=0, description="leading directions kept of a group of image embeddings; null: whole images, a control"
    )
    group: int | None = Field(None, gt=1, description=_GROUP)


class CaptionsConfig(Config):
    """Which captions are compared with an image."""

    short: Literal["first-sentence", "second"] = Field(
        "first-sentence", description="the long caption up to its first full stop, or the image's second caption"
    )


class LongClipConfig(RunConfig):
    """``llm/long-clip``."""

    captions: CaptionsConfig = CaptionsConfig()
    pcm: PcmConfig = PcmConfig()
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="in both losses; the official code has 0.1")
    scale: float | None = Field(None, gt=0, description="inverse temperature to start from; null keeps the model's")
    max_scale: float | None = Field(100.0, gt=1, description="inverse temperature is clamped to it; null: never")
    decay: Literal["matrices", "all"] = Field(
        "matrices", description="what weight_decay shrinks; all: norms, biases and the scale too, as the official code"
    )
    augment: bool = Field(False, description="random crops of training images; the paper has none")
    train: TrainConfig
