"""Settings of ``merging/agglomerate``."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, model_validator

from clipgraft.config.schema import Config, RunConfig, TrainConfig
from clipgraft_merging.agglomerate.adaptors import SpatialFrom, SummaryFrom
from clipgraft_merging.agglomerate.phi_s import Normalise
from clipgraft_merging.agglomerate.student import Positions
from clipgraft_merging.agglomerate.teachers import Kind

Balance = Literal["alternate", "split", "ranks"]


class AdaptorConfig(Config):
    """The MLPs between the student and a teacher."""

    hidden: int = Field(256, ge=0, description="inner width; 0: no adaptor, widths must be equal")
    blocks: int = Field(0, ge=0, description="inner layers with a residual")


class TeacherConfig(Config):
    """One teacher."""

    from_: str = Field(alias="from", description="a CLIP, a SAM, or a vision model of transformers: any reference")
    kind: Kind = Field("auto", description="clip, sam or vision; needed for hub ids of the last two")
    size: int | None = Field(None, gt=0, description="side at which it sees pictures [pixels]; null: its own")
    summary: float = Field(1.0, ge=0, description="weight of its summary; 0 leaves it out")
    spatial: float = Field(1.0, ge=0, description="weight of its spatial features; 0 leaves them out")
    summary_from: SummaryFrom = Field("cls", description="what of the student becomes its summary")
    spatial_from: SpatialFrom = Field("tokens", description="tokens after the last norm, or the tower's before it")
    summary_adaptor: AdaptorConfig = AdaptorConfig()
    spatial_adaptor: AdaptorConfig = AdaptorConfig()
    summary_normalise: Normalise = Field("none", description="of its summaries; a cosine hardly needs any")
    spatial_normalise: Normalise = Field("phi-s", description="of its spatial features")

    @model_validator(mode="after")
    def _teaches(self) -> Self:
        if self.summary == 0 and self.spatial == 0:
            raise ValueError("summary and spatial are both 0, so it teaches nothing; raise one or remove the teacher")
        return self


class GroupConfig(Config):
    """Teachers that see pictures together with the student at one of its sizes."""

    size: int | None = Field(None, gt=0, description="side at which the student sees pictures [pixels]; null: its own")
    teachers: tuple[str, ...] = Field((), description="names; empty: all")
    share: int = Field(1, gt=0, description="of steps, pictures or processes, in proportion")


class StatisticsConfig(Config):
    """The pass that measures teachers' features before the training."""

    samples: int = Field(2048, gt=1, description="pictures")
    batch_size: int = Field(64, gt=0, description="pictures per forward pass")


class SamStudent(Config):
    """Start from a SAM's tower with a CLIP head, instead of the model's own image tower."""

    from_: str = Field(alias="from", description="directory in transformers' format, hub id, or registered head")
    size: int = Field(448, gt=0, description="side of the images that the finished encoder takes [pixels]")
    blocks: int = Field(3, ge=0, description="transformer blocks of the head, copies of SAM's last")
    hidden: tuple[int, ...] = Field((), description="hidden widths of the head's MLP; empty: two as wide as the tower")


class StudentConfig(Config):
    """The image tower that learns."""

    sam: SamStudent | None = Field(None, description="start from a SAM's tower; null: the model's own image tower")
    positions: Positions = Field("resize", description="crop: random crops of the position table while training")
    tower_lr: float = Field(1.0, ge=0, description="learning rate of the tower, in train.lr; 0 trains adaptors alone")


class AgglomerateConfig(RunConfig):
    """``merging/agglomerate``."""

    teachers: dict[str, TeacherConfig] = Field(min_length=1, description="by a name of your own")
    student: StudentConfig = StudentConfig()
    groups: tuple[GroupConfig, ...] = Field((GroupConfig(),), min_length=1, description="sizes of the student")
    balance: Balance = Field(
        "alternate", description="of groups: one per step, a part of every batch each, or processes of their own"
    )
    statistics: StatisticsConfig = StatisticsConfig()
    train: TrainConfig
    crop: tuple[float, float] | None = Field((0.5, 1.0), description="area of random crops; null takes whole images")
    keep_adaptors: bool = Field(True, description="export the adaptors beside the model (L1); false leaves it L0")

    @model_validator(mode="after")
    def _names_fit(self) -> Self:
        for name in self.teachers:
            if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
                raise ValueError(f"teacher {name!r}: names are lower-case letters, digits, _ and -")
        for group in self.groups:
            if unknown := [name for name in group.teachers if name not in self.teachers]:
                raise ValueError(f"groups: {unknown[0]!r} is no teacher; there are {', '.join(self.teachers)}")
        used = {name for group in self.groups for name in (group.teachers or self.teachers)}
        if idle := sorted(set(self.teachers) - used):
            raise ValueError(f"teacher {idle[0]!r} belongs to no group; add it to one or remove it")
        return self
