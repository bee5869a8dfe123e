"""Settings that all recipes of this plugin share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from clipgraft.config.schema import Config, RunConfig, TrainConfig

Statistics = Literal["model", "clip", "imagenet"]


class VideoTextConfig(Config):
    """Texts of the classes."""

    templates: tuple[str, ...] = Field(
        (), description="prompts with one {}; empty takes those of the data, else the bare names; training draws one"
    )
    descriptions: str | None = Field(
        None, description="file of class names with descriptions: a class is told by its description, or its name"
    )


class MixingConfig(Config):
    """Mixup and CutMix of clips."""

    mixup: float = Field(0.0, ge=0, description="alpha of the Beta law; 0 for never")
    cutmix: float = Field(0.0, ge=0, description="alpha of the Beta law; 0 for never")
    switch: float = Field(0.5, ge=0, le=1, description="how often CutMix where both are on")


class VideoRunConfig(RunConfig):
    """Shared by all recipes of ``video``."""

    text: VideoTextConfig = VideoTextConfig()
    statistics: Statistics = Field(
        "model", description="pixel mean and deviation; imagenet is what ViFi-CLIP's, X-CLIP's and ILA's code uses"
    )
    objective: Literal["classes", "labels", "captions"] = Field(
        "classes", description="all classes, classes inside the batch, or one caption per video"
    )
    smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="label smoothing, of the objective classes")
    mixing: MixingConfig = MixingConfig()
    train: TrainConfig
