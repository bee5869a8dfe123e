"""Settings of ``merging/sam-clip``."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from clipgraft.config.schema import Config, RunConfig, TrainConfig
from clipgraft_merging.samclip.losses import IouTarget, MaskKind, Match
from clipgraft_merging.samclip.masked_source import Fit

Size = Annotated[int, Field(gt=0)]


class SamOrigin(Config):
    """The SAM that the student starts from, which is also the teacher of masks."""

    from_: str = Field(alias="from", description="directory in transformers' format, hub id, or registered head")
    revision: str | None = Field(None, description="commit of a hub repository")
    sha256: str | None = Field(None, description="of its model.safetensors")
    start: Literal["pretrained", "random"] = Field(
        "pretrained", description="random: a control, only the teacher is it"
    )


class Student(Config):
    """The CLIP head and the size that the finished encoder takes."""

    size: int = Field(448, gt=0, description="side of the images that the finished encoder takes [pixels]")
    blocks: int = Field(3, ge=0, description="transformer blocks of the head, copies of SAM's last")
    hidden: tuple[Size, ...] = Field((), description="hidden widths of the head's MLP; empty: two as wide as the tower")
    mean_of: int = Field(
        512, ge=0, description="pictures whose mean teacher embedding the head starts at; 0: a random start [pictures]"
    )
    recompute: bool = Field(False, description="run the tower's blocks again in the backward pass: less memory")


class ClipStream(Config):
    """Images on which the student imitates the CLIP."""

    sizes: tuple[Size, ...] = Field(min_length=1, description="sides to draw one of per step [pixels]")
    crop: tuple[float, float] | None = Field((0.9, 1.0), description="area of random crops; null takes whole images")
    train: TrainConfig


class MaskStream(Config):
    """Images on which the student imitates the SAM, always at SAM's native size."""

    weight: float = Field(10.0, ge=0, description="of the mask loss (lambda); 0: no such stream, SAM is forgotten")
    data: str | None = Field(None, description="data reference; null: the same as data.from")
    batch_size: int = Field(32, gt=0, description="images per optimizer step over all ranks and chunks")
    points: int = Field(16, ge=0, description="point prompts per image")
    boxes: int = Field(16, ge=0, description="box prompts per image")
    masks: int = Field(32, gt=0, description="masks of an image that prompts are drawn from, the largest")
    noise: float = Field(0.1, ge=0, description="standard deviation of box corners, per side")
    grid: int = Field(8, gt=0, description="points per side when the teacher makes the masks itself")
    fit: Fit = Field("pad", description="how a picture meets the square: pad as SAM does, or squash")
    loss: MaskKind = Field("soft", description="targets: the teacher's probabilities, or its thresholded mask (hard)")
    match: Match = Field("min", description="min: the nearest of three masks learns; each: all three")
    iou: IouTarget = Field("teacher", description="what guessed IoUs learn: the teacher's guess, or the measured IoU")
    focal: float = Field(20.0, ge=0, description="weight of the focal term")
    dice: float = Field(1.0, ge=0, description="weight of the dice term")
    iou_weight: float = Field(1.0, ge=0, description="weight of the guessed IoU")

    @model_validator(mode="after")
    def _prompted(self) -> Self:
        if self.points + self.boxes == 0:
            raise ValueError("give points or boxes; without prompts there are no masks")
        return self


class MultiTask(ClipStream):
    """Both streams at once."""

    masks: MaskStream = MaskStream()
    tower_lr: float = Field(0.1, gt=0, description="learning rate of SAM's tower, as a share of train.lr")
    decoder_lr: float = Field(0.1, gt=0, description="of SAM's neck and mask decoder")


class Cache(Config):
    """Teachers' features on disk; needs streams without augmentation (crop: null)."""

    clip: bool = Field(False, description="keep CLIP's embeddings, D numbers per image")
    sam: bool = Field(False, description="keep SAM's features: 2 MB per image of 1024 pixels in fp16")
    folder: str | None = Field(None, description="where; null: in the run")
    dtype: Literal["fp32", "fp16"] = Field("fp32", description="as which numbers")


class SamClipConfig(RunConfig):
    """``merging/sam-clip``."""

    sam: SamOrigin
    student: Student = Student()
    probe: ClipStream | None = Field(None, description="stage I: the head alone, on CLIP's images; null skips it")
    multitask: MultiTask | None = Field(None, description="stage II: everything, on both streams; null skips it")
    adapt: ClipStream | None = Field(None, description="stage III: the head alone, at more sizes; null skips it")
    cache: Cache = Cache()

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if self.probe is None and self.multitask is None and self.adapt is None:
            raise ValueError("probe, multitask and adapt are all null; give at least one stage")
        cropped = [s.crop for s in (self.probe, self.multitask, self.adapt) if s is not None and s.crop is not None]
        if self.cache.clip and cropped:
            raise ValueError("cache.clip keeps what a teacher says of whole images; set crop to null in every stage")
        return self
