"""``merging/ewa``: fine-tuning on image-text pairs with Experts Weights Averaging, exported as the plain CLIP it was.

Huang et al., Experts Weights Averaging: A New General Training Scheme for Vision Transformers, arXiv 2308.06093. What
stands here follows the abstract and its equations as we know them; there is no official code to compare with.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from pydantic import Field, model_validator

from clipgraft.encoders.base import Encoder
from clipgraft.finetune import Finetune, FinetuneConfig, FinetuneStage
from clipgraft.recipe import StagePlan
from clipgraft.runner import Run
from clipgraft_merging.ewa.experts import AveragedExperts, check_share, draw_together, share_at
from clipgraft_merging.feed_forwards import Tower, feed_forwards


class EwaConfig(FinetuneConfig):
    """Settings of ``merging/ewa``: those of finetune, and the experts."""

    experts: int = Field(4, ge=1, description="copies of a feed-forward network in training; 1 is plain fine-tuning")
    every: int = Field(2, ge=1, description="every n-th block from the top gets them [blocks]")
    towers: tuple[Tower, ...] = Field(("image", "text"), min_length=1, description="towers that get them")
    share: float = Field(
        0.3, ge=0, lt=1, description="of its weights that an expert gives for the others' mean per step"
    )
    ramp: float = Field(1.0, ge=0, le=1, description="part of the training in which the share grows linearly from 0")

    @model_validator(mode="after")
    def _share_fits(self) -> EwaConfig:
        check_share(self.share, experts=self.experts)
        return self


class Ewa(Finetune):
    """One stage, ``train``, as in finetune."""

    config: EwaConfig

    def plan(self) -> list[StagePlan]:
        """The stage of finetune, with experts while it runs."""
        return [StagePlan("train", self._build)]

    def check(self, run: Run) -> list[str]:
        """What finetune refuses, and adapters over the networks that are copied."""
        found = super().check(run)
        if any(node.use.rpartition("/")[2] in ("lora", "moe") for node in self.config.grafts):
            found.append("ewa copies feed-forward networks; remove lora and moe from grafts")
        return found

    def _build(self, run: Run) -> EwaStage:
        c = self.config
        plain = super()._build(run)
        return EwaStage(
            "train",
            train=c.train,
            source=plain.source,
            encoder=plain.encoder,
            losses=list(plain.losses),
            weights=plain.weights,
            teacher=plain.teacher,
            max_logit_scale=c.max_logit_scale,
            experts=c.experts,
            every=c.every,
            towers=c.towers,
            share=c.share,
            ramp=round(c.ramp * c.train.steps),
        )


class EwaStage(FinetuneStage):
    """Fine-tuning whose chosen networks are averaged experts."""

    def __init__(
        self,
        name: str,
        *,
        experts: int,
        every: int = 2,
        towers: tuple[Tower, ...] = ("image", "text"),
        share: float,
        ramp: int,
        **finetune: Any,
    ) -> None:
        super().__init__(name, **finetune)
        self.share, self.ramp = share, ramp
        check_share(share, experts=experts)
        for place in feed_forwards(self.encoder, towers=towers, every=every):
            place.put(AveragedExperts(place.module, experts=experts))

    def averaged(self) -> list[AveragedExperts]:
        """The experts, place by place."""
        return [m for m in self.encoder.modules() if isinstance(m, AveragedExperts)]

    def after_update(self, step: int) -> None:
        """Draw the experts together, after every optimizer step."""
        super().after_update(step)
        draw_together(self.averaged(), share_at(step, share=self.share, ramp=self.ramp))

    def current_encoder(self) -> Encoder:
        """A plain CLIP with the experts' means, apart from the one in training."""
        data = self.encoder.data
        shared = [data.tokenizer, *(g.graft for g in data.grafts)]  # may be large, or hold other models
        plain = deepcopy(self.encoder, {id(x): x for x in shared})
        for place in feed_forwards(plain):
            if isinstance(place.module, AveragedExperts):
                place.put(place.module.collapse())
        return plain.eval()
