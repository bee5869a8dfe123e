"""The settings that every recipe shares. A recipe's config model subclasses ``RunConfig``."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from clipgraft.errors import InputError
from clipgraft.spec import Kind


class Config(BaseModel):
    """Base of every config: frozen, unknown keys are errors, no silent coercion of strings to numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, protected_namespaces=())


class Node(BaseModel):
    """A registered component with its settings: ``{use: plugin/name, key: value}``; a bare string means no settings."""

    model_config = ConfigDict(frozen=True, extra="allow")
    kind: ClassVar[Kind]
    use: str

    @property
    def settings(self) -> dict[str, Any]:
        """Everything but ``use``."""
        return dict(self.model_extra or {})


def _as_node(value: Any) -> Any:
    return {"use": value} if isinstance(value, str) else value


class GraftNode(Node):
    """A graft by name."""

    kind: ClassVar[Kind] = "graft"


class LossNode(Node):
    """A loss by name, with its ``weight`` among the settings of the stage that uses it."""

    kind: ClassVar[Kind] = "loss"


class HookNode(Node):
    """A lifecycle hook by name."""

    kind: ClassVar[Kind] = "run-hook"


class EvaluatorNode(Node):
    """An evaluator by name, with the ``data`` reference that it measures on (default: ``evaluate.data``).

    "NAME[?KEY=VALUE&...][@SRC]" is short for all of it.
    """

    kind: ClassVar[Kind] = "evaluator"
    data: str | None = None


def evaluator_named(text: str) -> EvaluatorNode:
    """``NAME[?KEY=VALUE&KEY=VALUE][@SRC]``, values as YAML."""
    from clipgraft.config.load import parse_yaml

    name, _, data = text.partition("@")
    name, _, query = name.partition("?")
    pairs = [part.partition("=") for part in query.split("&") if part]
    if bad := [key for key, equals, _ in pairs if not equals or key in ("use", "data")]:
        raise InputError(f"{text}: {bad[0]!r} is no setting; write NAME?key=value&key=value@SRC")
    settings = {key: parse_yaml(value, origin=text) for key, _, value in pairs}
    return EvaluatorNode(use=name, data=data or None, **settings)


def _as_evaluator(value: Any) -> Any:
    return evaluator_named(value) if isinstance(value, str) else value


GraftRef = Annotated[GraftNode, BeforeValidator(_as_node)]
LossRef = Annotated[LossNode, BeforeValidator(_as_node)]
HookRef = Annotated[HookNode, BeforeValidator(_as_node)]
EvaluatorRef = Annotated[EvaluatorNode, BeforeValidator(_as_evaluator)]


class ModelConfig(Config):
    """The base model: ``from`` is any model reference."""

    from_: str = Field(alias="from", description="registered encoder, open_clip:ARCH[/TAG], hf:ORG/NAME or a directory")


class DataConfig(Config):
    """Training data."""

    from_: str = Field(
        alias="from",
        description="folder:DIR, csv:FILE, a registered dataset (plugin/name?key=value) or its scheme (name:PATH)",
    )
    exclude: str | None = Field(None, description="file of sample ids to leave out, one per line")
    balance: Literal["none", "class", "group"] = Field("none", description="show each of them equally often per epoch")
    batches: Literal["random", "hard"] = Field("random", description="hard: batches of similar samples")
    neighbours: str | None = Field(None, description="embeddings (clipgraft embed) that say what resembles what")
    cluster: int = Field(16, ge=2, description="for hard: neighbours that stand together in a batch [samples]")
    max_bad: float = Field(0.01, ge=0, le=1, description="share of unreadable samples above which the run fails")
    workers: int = Field(0, ge=0, description="data worker processes per rank")
    max_pixels: int = Field(100_000_000, gt=0, description="larger images are refused as decompression bombs [pixels]")

    @model_validator(mode="after")
    def _hard_needs_neighbours(self) -> Self:
        if (self.batches == "hard") != (self.neighbours is not None):
            raise ValueError("batches: hard and neighbours: FILE go together; give both or neither")
        return self


class TrainConfig(Config):
    """One training stage."""

    steps: int = Field(..., gt=0, description="optimizer steps")
    batch_size: int = Field(..., gt=0, description="samples per optimizer step over all ranks and chunks")
    lr: float = Field(..., gt=0, description="peak learning rate")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="fused AdamW, or SGD with momentum")
    betas: tuple[float, float] = Field((0.9, 0.999), description="decay of AdamW's two averages per step")
    momentum: float = Field(0.9, ge=0, lt=1, description="for sgd")
    eps: float = Field(1e-8, gt=0, description="added to AdamW's denominator")
    weight_decay: float = Field(0.01, ge=0, description="not applied to biases, norms and scalars")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="learning rate after the warm-up")
    warmup: int = Field(0, ge=0, description="linear warm-up [steps]")
    layer_decay: float = Field(1.0, gt=0, le=1, description="learning rate factor per tower block from the top")
    clip_norm: float | None = Field(1.0, gt=0, description="gradient L2 norm limit; null switches it off")
    accumulate: int = Field(
        1, gt=0, description="chunks per optimizer step; batch-coupled losses use the feature cache"
    )
    ema: float | None = Field(None, gt=0, lt=1, description="decay per step of averaged weights, exported when set")
    log_every: int = Field(10, gt=0, description="a line of metrics.jsonl every n steps [steps]")
    save_every: int = Field(0, ge=0, description="resume state every n steps; 0 saves only on a stop request [steps]")
    keep: int = Field(2, gt=0, description="resume states to keep")
    evaluate_every: int = Field(0, ge=0, description="run evaluate.on every n steps; 0 never [steps]")


class EvaluateConfig(Config):
    """What is measured before and after the run."""

    on: tuple[EvaluatorRef, ...] = Field((), description="evaluators before and after the run, and every n steps")
    data: str | None = Field(None, description="default data reference of the evaluators")
    batch_size: int = Field(256, gt=0, description="images per forward pass")
    precision: Literal["auto", "fp32", "bf16"] = Field("fp32", description="autocast of what is measured")
    every_stage: bool = Field(False, description="measure between stages too")
    retention: str | tuple[EvaluatorRef, ...] = Field(
        "auto",
        description="what training should not cost, measured before and after it: a suite, FILE.yaml, a list of "
        "evaluators, none, or auto (the suite named retention, if exactly one plugin in use offers one)",
    )


class DistributedConfig(Config):
    """Several processes. They come from torchrun; these settings say what is expected of them."""

    processes: int | None = Field(None, gt=0, description="refuse to run as another number of processes; null: any")
    shard: bool = Field(False, description="split weights, gradients and optimizer state over the processes (FSDP2)")
    file: str | None = Field(None, description="Accelerate's configuration file: the number of processes, and FSDP2")


class PerformanceConfig(Config):
    """How the arithmetic is done. ``auto`` is settled from the hardware when the run starts, and written down so."""

    compile: bool | Literal["auto"] = Field(False, description="torch.compile the blocks of a stage while it trains")
    channels_last: bool | Literal["auto"] = Field(False, description="memory order of convolutions in training")
    attention: Literal["auto", "flash", "efficient", "cudnn", "math"] = Field(
        "auto", description="kernel of torch's scaled dot product attention; auto leaves it to torch"
    )


class CardConfig(Config):
    """What the model card says and no run can know."""

    license: str | None = Field(None, description="of the exported model, best an id of the hub such as apache-2.0")
    sources: str | dict[str, str] | None = Field(
        None, description="licences of the base model and of the data, in words or by name"
    )
    limits: str | None = Field(None, description="what the model must not be used for, or can't do")


class RunConfig(Config):
    """The top level of a run; recipes add their own blocks."""

    model: ModelConfig
    data: DataConfig
    grafts: tuple[GraftRef, ...] = Field((), description="structural changes of the model, applied in this order")
    evaluate: EvaluateConfig = EvaluateConfig()
    card: CardConfig = CardConfig()
    hooks: tuple[HookRef, ...] = Field((), description="lifecycle hooks to switch on")
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field((), description="also log there")
    requires: tuple[str, ...] = Field((), description="requirements of plugins, such as clipgraft-diffusion>=0.1")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("fp32", description="autocast; weights stay fp32")
    performance: PerformanceConfig = PerformanceConfig()
    seed: int = Field(0, ge=0, description="of everything that is drawn")
    deterministic: bool = Field(False, description="only kernels that give the same bits every time; may be slower")
    threads: int | None = Field(None, gt=0, description="CPU threads of this process; null leaves them")
    distributed: DistributedConfig = DistributedConfig()

    @model_validator(mode="before")
    @classmethod
    def _auto_in_a_word(cls, values: Any) -> Any:
        """``performance: auto`` is auto for each of its keys, and for a precision that isn't set."""
        word = values.get("performance") if isinstance(values, dict) else None
        if not isinstance(word, str):
            return values
        if word != "auto":
            raise ValueError(f"performance is {word!r}; write auto, or a block with compile, channels_last, attention")
        return {"precision": "auto", **values, "performance": dict.fromkeys(PerformanceConfig.model_fields, "auto")}
