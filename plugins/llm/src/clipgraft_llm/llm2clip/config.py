"""Settings of the recipes ``llm/llm2clip`` and ``llm/caption-contrast``."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from clipgraft.config.schema import Config, ModelConfig, RunConfig, TrainConfig
from clipgraft_llm.tower.graft import TransformerText
from clipgraft_llm.tower.settings import Attention, Over, Pooling


class CacheConfig(Config):
    """Where the frozen text model's features come from."""

    use: Literal["cached", "online"] = Field("cached", description="asked once per caption, or in every step")
    folder: str | None = Field(
        None, description="a cache made by clipgraft llm cache; null makes one of this run's data in its directory"
    )
    stored: Literal["bf16", "fp32"] = Field("bf16", description="number format of a cache that the run makes")
    rows: int = Field(4096, gt=0, description="samples per file of a cache that the run makes")
    batch_size: int = Field(64, gt=0, description="captions per forward pass of the text model")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.use == "online" and self.folder is not None:
            raise ValueError("cache.folder is for use: cached; leave it out, or switch")
        return self


class Llm2ClipConfig(RunConfig):
    """``llm/llm2clip``: the image tower and a projection learn a frozen text model's space."""

    text: TransformerText
    cache: CacheConfig = CacheConfig()
    train_image: bool = Field(True, description="train the image tower; false trains the projections alone")
    visual_decay: float = Field(
        1.0, gt=0, le=1, description="learning rate factor per block of the image tower, counted from its head"
    )
    compat: Literal["none", "official"] = Field(
        "none", description="official: class token and first norm of the image tower learn at the full rate, as there"
    )
    max_logit_scale: float = Field(100.0, gt=0, description="logit_scale is clamped to this after every step")
    reset_scale: bool = Field(False, description="start logit_scale at 1 / 0.07 instead of the model's own")
    train: TrainConfig

    @model_validator(mode="after")
    def _one_decay(self) -> Self:
        if self.train.layer_decay != 1:
            raise ValueError("train.layer_decay counts blocks of all towers; use visual_decay here")
        return self


class LoraConfig(Config):
    """Low-rank adapters in the text model, merged at the end."""

    rank: int = Field(16, gt=0, description="columns of A and B")
    alpha: float = Field(32, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(0.05, ge=0, lt=1, description="share of an adapter's inputs dropped")
    targets: tuple[str, ...] = Field((), description="names of linear layers such as q_proj; empty: all of them")


class CaptionTextConfig(Config):
    """How the text model is asked while it is trained, and ever after."""

    template: str | None = Field(None, description="prompt around a text, with {} once; null: the directory's own")
    pooling: Pooling | None = Field(None, description="of hidden states; null: the directory's own, else mean")
    over: Over | None = Field(None, description="tokens that mean pools; null: the caption's own in a decoder")
    attention: Attention | None = Field(
        "bidirectional", description="bidirectional opens a causal model, which is checked; null: as the directory says"
    )
    max_length: int | None = Field(None, gt=3, description="longest text, prompt included [tokens]")
    dtype: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="of the frozen weights under the adapters")


class CaptionContrastConfig(RunConfig):
    """``llm/caption-contrast``: captions of one picture belong together, in a text model alone (``model: llm:DIR``)."""

    model: ModelConfig = Field(description="the text model: from: llm:DIR, llm:ORG/NAME or llm:plugin/head")
    text: CaptionTextConfig = CaptionTextConfig()
    lora: LoraConfig | None = Field(LoraConfig(), description="null trains every weight")
    instruction: str = Field("", description="put before the query of a pair, outside of what is pooled")
    negatives: bool = Field(True, description="a further caption per pair that belongs to another sample")
    scale: float = Field(50.0, gt=0, description="of cosines, fixed")
    recompute: bool = Field(False, description="keep no activations of the text model: less memory, more time")
    train: TrainConfig
