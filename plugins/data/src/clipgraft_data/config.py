"""What each dataset takes; ``path`` is what follows the scheme."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from clipgraft.config.schema import Config
from clipgraft.data.images import MAX_PIXELS

_KEYS = "fields that hold captions, with how often each is drawn: raw:0.3,synthetic:0.7"


class PathConfig(Config):
    """What every dataset of files takes."""

    path: str = Field(description="what follows the scheme")
    max_pixels: int = Field(MAX_PIXELS, gt=0, description="larger images are refused; data.max_pixels sets it [pixels]")


class WdsConfig(PathConfig):
    """``wds:``."""

    captions: str | None = Field(None, description=f"{_KEYS}; of the .json members, not of .txt")
    lines: bool = Field(False, description="each line of a .txt member is a caption")
    truncated: Literal["refuse", "keep"] = Field("refuse", description="keep: take the whole samples of a cut shard")


class HfConfig(PathConfig):
    """``hf:``."""

    name: str | None = Field(None, description="configuration of a hub data set that has several")
    split: str | None = Field(None, description="needed when there are several")
    revision: str | None = Field(None, description="commit, tag or branch on the hub")
    image: str = Field("image", description="column of images")
    caption: str | None = Field(None, description=f"{_KEYS}; the first of captions, caption and text without it")
    label: str | None = Field(None, description="column of classes; label without it, where there is one")
    id: str | None = Field(None, description="column of unique names; row numbers without it")
    streaming: bool = Field(False, description="only together with take")
    take: int | None = Field(None, gt=0, description="stream this many rows into memory instead of downloading all")


class TableConfig(PathConfig):
    """``table:``."""

    captions: str | None = Field(None, description=f"{_KEYS}; captions or caption without it")


class KarpathyConfig(PathConfig):
    """``karpathy:``."""

    images: str = Field(description="folder that holds the images")
    split: str = Field("test", description="train, restval, val or test; train+restval for both")


class CocoConfig(PathConfig):
    """``coco:``."""

    images: str = Field(description="folder that holds the images")


class MixConfig(PathConfig):
    """``mix:``."""

    size: int | None = Field(None, gt=0, description="samples of an epoch; as many as all parts have without it")
