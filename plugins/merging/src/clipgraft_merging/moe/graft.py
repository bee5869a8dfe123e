"""``merging/moe``: feed-forward networks become mixtures of experts that begin as copies (sparse upcycling)."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from clipgraft.config.schema import Config
from clipgraft.errors import InputError
from clipgraft_merging.feed_forwards import Tower, feed_forwards
from clipgraft_merging.moe.mixture import Mixture

if TYPE_CHECKING:
    from clipgraft.encoders.base import Encoder


class MoE(Config):
    """Mixtures of experts in the blocks of open_clip towers; everything else stays shared.

    The encoder computes what it did before until gates or experts change. open_clip has no such block, so an export is
    L2; ``clipgraft merging collapse`` makes a plain CLIP of it again.
    """

    portable: ClassVar[bool] = False

    experts: int = Field(4, ge=2, description="networks per block")
    top_k: int = Field(2, ge=2, description="experts that a token is sent to")
    towers: tuple[Tower, ...] = Field(("image", "text"), min_length=1, description="towers that get them")
    last: int | None = Field(None, ge=1, description="only this many blocks from the top of each tower [blocks]")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of an expert's hidden units dropped in training")
    seed: int = Field(0, ge=0, description="of the gates' first weights")

    @model_validator(mode="after")
    def _enough_experts(self) -> MoE:
        if self.top_k > self.experts:
            raise ValueError(f"top_k is {self.top_k} for {self.experts} experts; choose 2 to {self.experts}")
        return self

    def apply(self, encoder: Encoder) -> Encoder:
        """Replace in place; gates are drawn from ``seed`` and the block's number."""
        for number, place in enumerate(feed_forwards(encoder, towers=self.towers, last=self.last)):
            if isinstance(place.module, Mixture):
                raise InputError("merging/moe: the model has mixtures of experts already; collapse it first")
            experts = [place.module, *(deepcopy(place.module) for _ in range(self.experts - 1))]
            seed = self.seed * 1009 + number
            place.put(Mixture(experts, top_k=self.top_k, dropout=self.dropout, seed=seed))
        return encoder

    def merge(self, encoder: Encoder) -> Encoder:
        """A gate's choice has no plain weights: the graft stays."""
        return encoder
