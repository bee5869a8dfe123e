"""Settings of the recipes that fine-tune copies of a base and merge them."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from clipgraft.config.schema import Config, DataConfig, EvaluatorNode, EvaluatorRef, RunConfig, TrainConfig
from clipgraft_merging.opcm.projection import Compat, Mode
from clipgraft_merging.opcm.settings import Method, Qkv
from clipgraft_merging.recipes_merge.tuning import TuningConfig

Alpha = Annotated[float, Field(ge=0, le=1)]
ZERO_SHOT = EvaluatorNode(use="core/zero-shot")


class Variation(Config):
    """What one fine-tune has different from ``train``; null leaves it as it is."""

    order: int = Field(0, ge=0, description="another order of the data, and other crops")
    data: str | None = Field(None, description="other training data than data.from")
    lr: float | None = Field(None, gt=0, description="peak learning rate")
    steps: int | None = Field(None, gt=0, description="optimizer steps")
    batch_size: int | None = Field(None, gt=0, description="samples per step")
    weight_decay: float | None = Field(None, ge=0, description="not applied to biases, norms and scalars")
    label_smoothing: float | None = Field(None, ge=0, lt=1, description="for classes")
    crop: float | None = Field(None, gt=0, le=1, description="smallest area of the training crop")

    def train(self, train: TrainConfig) -> TrainConfig:
        """``train`` with this fine-tune's values."""
        names = ("lr", "steps", "batch_size", "weight_decay")
        return train.model_copy(update={k: v for k in names if (v := getattr(self, k)) is not None})

    def tuning(self, tuning: TuningConfig) -> TuningConfig:
        """``tuning`` with this fine-tune's values."""
        names = ("label_smoothing", "crop")
        return tuning.model_copy(update={k: v for k in names if (v := getattr(self, k)) is not None})


class Judging(Config):
    """How models are told apart before anything is tested."""

    on: EvaluatorRef = Field(ZERO_SHOT, description="evaluator")
    data: str | None = Field(None, description="held-out data, neither trained nor tested on")
    metric: str | None = Field(None, description="of the evaluator; null takes its first")


class SoupRunConfig(RunConfig):
    """``merging/soup``."""

    ingredients: tuple[str | Variation, ...] = Field(
        min_length=1, description="models that exist, by reference, or fine-tunes that the run makes, by what differs"
    )
    soup: Literal["uniform", "greedy", "best", "task-arithmetic", "ties"] = Field(
        "uniform",
        description="uniform: all; greedy: those that help; best: no soup, the best single one, a control; "
        "task-arithmetic, ties: what each changed in the base, added",
    )
    scale: float | None = Field(None, description="of task-arithmetic (null: 0.3) and ties (null: 1)")
    density: float = Field(0.2, gt=0, le=1, description="share of entries that ties keeps")
    judge: Judging = Field(Judging(), description="for greedy and best, and to tell the ingredients apart")
    tuning: TuningConfig = TuningConfig()
    train: TrainConfig

    @model_validator(mode="after")
    def _held_out(self) -> Self:
        if self.soup in ("greedy", "best") and self.judge.data is None:
            raise ValueError(
                f"soup {self.soup} chooses by a held-out score; set judge.data to data that isn't tested on"
            )
        return self


class WiseFtRunConfig(RunConfig):
    """``merging/wise-ft``."""

    tuned: str | None = Field(
        None, description="a fine-tuned version of the model, by reference; null fine-tunes one first"
    )
    alpha: Alpha | None = Field(None, description="0 base, 1 fine-tuned; null takes the best of alphas by judge")
    alphas: tuple[Alpha, ...] = Field(
        (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
        min_length=1,
        description="points of the path; both ends are always measured",
    )
    judge: Judging = Field(Judging(), description="data and metric by which alpha is chosen, and on which is reported")
    shifted: str | None = Field(None, description="data under a shift, for the report of the path")
    same: str | None = Field(None, description="data without a shift, for the report of the path")
    tuning: TuningConfig = TuningConfig()
    train: TrainConfig

    @model_validator(mode="after")
    def _chosen(self) -> Self:
        if self.alpha is None and self.judge.data is None:
            raise ValueError(
                "alpha null is chosen by a held-out score; set judge.data, or give alpha (0.5 needs no data)"
            )
        return self


class Task(Config):
    """One task of a sequence."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", description="letters, digits and hyphens")
    data: str | None = Field(None, description="training data; null takes model")
    model: str | None = Field(None, description="a model that is fine-tuned already, instead of data")
    measure: str = Field(description="data on which the task is measured")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.data is None) == (self.model is None):
            raise ValueError(f"task {self.name}: give data to fine-tune on, or a model that was")
        return self


class OpcmRunConfig(RunConfig):
    """``merging/opcm``."""

    data: DataConfig = Field(DataConfig(**{"from": "tasks"}), description="how tasks' data are read; from is unused")
    tasks: tuple[Task, ...] = Field(min_length=2, description="in the order in which they arrive")
    orders: int = Field(1, gt=0, description="1: as listed; more are shuffled by the seed, and results are their means")
    method: Method = Field("opcm", description="how a model is merged into those before")
    compare: tuple[Method, ...] = Field((), description="methods that are measured on the same models too")
    alpha: float = Field(0.5, ge=0, lt=1, description="opcm: share of singular values that is protected")
    mode: Mode = Field("code", description="opcm: paper drops links to weak directions too")
    qkv: Qkv = Field("split", description="opcm: project q, k and v each, or as one matrix")
    compat: Compat = Field("none", description="opcm: fusionbench reproduces the official code's omissions")
    scale: float = Field(0.3, description="of task-arithmetic and ties")
    density: float = Field(0.2, gt=0, le=1, description="share of entries that ties keeps")
    judge: EvaluatorRef = Field(ZERO_SHOT, description="what accuracy on a task is: the evaluator's first metric")
    tuning: TuningConfig = TuningConfig()
    train: TrainConfig

    @model_validator(mode="after")
    def _names(self) -> Self:
        names = [task.name for task in self.tasks]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two tasks are called {twice[0]}; give each a name of its own")
        return self
