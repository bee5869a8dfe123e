"""Settings of ``merging/clip-moe``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from clipgraft.config.schema import Config, RunConfig, TrainConfig
from clipgraft_merging.feed_forwards import Tower
from clipgraft_merging.moe.balance import Compat
from clipgraft_merging.moe.kmeans import Engine


class ExpertsConfig(Config):
    """Extraction of the experts: one stage of clustering and one of training for each."""

    stages: int = Field(3, ge=1, le=7, description="experts beside the model's own")
    clusters: int = Field(3, ge=2, description="k-means clusters of the images, and of the texts, per stage")
    by: Literal["kmeans", "random"] = Field("kmeans", description="random: control arm, clusters of the same sizes")
    engine: Engine = Field(
        "torch", description="torch: all rows per iteration; scikit-learn: mini-batches, as published"
    )
    max_iter: int = Field(500, ge=1, description="of k-means")
    tol: float = Field(1e-5, ge=0, description="k-means stops at this squared shift of its centres")
    restart: Literal["base", "previous"] = Field(
        "base", description="what a stage's training begins from; the official code says base, the paper leaves it open"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="of the contrastive loss")
    train: TrainConfig


class RouterConfig(Config):
    """The gates' training, with the experts in place."""

    top_k: int = Field(2, ge=2, description="experts that a token is sent to")
    towers: tuple[Tower, ...] = Field(("image", "text"), min_length=1, description="towers that get experts")
    last: int | None = Field(None, ge=1, description="only this many blocks from the top of each tower [blocks]")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of an expert's hidden units dropped in training")
    balance: float = Field(0.01, ge=0, description="weight of the balance loss, a mean over the towers' mixtures")
    compat: Compat = Field(
        "paper", description="official: pool all mixtures of a tower before balancing, and add up the towers"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="of the contrastive loss")
    logit_scale: float | None = Field(
        None, gt=0, description="inverse temperature, fixed throughout the recipe and exported; null: the model's own"
    )
    tune: Literal["gates", "experts"] = Field("gates", description="experts: train gates and experts")
    train: TrainConfig


class ClipMoeConfig(RunConfig):
    """CLIP-MoE: experts from contrast inside clusters, then gates."""

    init: Literal["extracted", "copies"] = Field(
        "extracted", description="copies: plain sparse upcycling, no experts are extracted"
    )
    experts: ExpertsConfig
    router: RouterConfig
    export: Literal["moe", "dense"] = Field(
        "moe", description="dense: the experts' mean in place of each mixture, a plain CLIP"
    )

    @model_validator(mode="after")
    def _enough_experts(self) -> ClipMoeConfig:
        if self.router.top_k > self.experts.stages + 1:
            raise ValueError(f"router.top_k is {self.router.top_k} for {self.experts.stages + 1} experts; lower it")
        return self
