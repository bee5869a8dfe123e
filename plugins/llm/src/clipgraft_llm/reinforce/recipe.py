"""Reinforced training: one stage, ``train``, on stored teachers; no teacher is loaded.

Vasu et al., MobileCLIP: Fast Image-Text Models through Multi-Modal Reinforced Training, CVPR 2024, arXiv 2311.17049.
"""

from __future__ import annotations

from clipgraft.config.schema import LossNode
from clipgraft.errors import InputError
from clipgraft.finetune import Finetune
from clipgraft.recipe import StagePlan
from clipgraft.runner import Run
from clipgraft_llm.named_recipe import built, named
from clipgraft_llm.named_stage import NamedStage
from clipgraft_llm.reinforce.config import ReinforceConfig
from clipgraft_llm.reinforce.layout import Reinforcement
from clipgraft_llm.reinforce.source import ReinforcedStore, reinforced


class Reinforce:
    """One stage."""

    def __init__(self, config: ReinforceConfig) -> None:
        self.config = config

    def plan(self) -> list[StagePlan]:
        """The stage."""
        return [StagePlan("train", self._train)]

    def check(self, run: Run) -> list[str]:
        """Losses, the store, and scales for each of its teachers."""
        problems = Finetune(self.config).check(run)
        if self.config.teacher is not None:
            problems.append("teacher: the teachers are those of the store; leave teacher out")
        try:
            run.encoder.tokenizer  # noqa: B018, an encoder without text tower says so
            found = ReinforcedStore(self.config.store).described
            many = len(found.teachers)
            for node in self.config.losses:
                scales = node.settings.get("scales") or ()
                if named([node.use]) == {"reinforced"} and scales and len(scales) != many:
                    problems.append(
                        f"{node.use}: {len(scales)} scales for the store's {many} teachers; give one per teacher"
                    )
        except InputError as error:
            problems.append(str(error))
        if "reinforced" not in named(node.use for node in self.config.losses):
            problems.append("losses: none of them reads stored teachers; list llm/reinforced")
        return problems

    def _train(self, run: Run) -> NamedStage:
        store = ReinforcedStore(self.config.store)
        source = reinforced(
            run.train_source(), store, tokenizer=run.encoder.tokenizer, size=run.encoder.preprocess.size, log=run.log
        )
        config = self.config.model_copy(update={"losses": tuple(told(n, store.described) for n in self.config.losses)})
        losses, weights = built(run, config)
        return NamedStage(
            "train",
            train=config.train,
            source=source,
            encoder=run.encoder,
            losses=losses,
            weights=weights,
            max_logit_scale=config.max_logit_scale,
            more=("synthetic",) if store.described.written else (),
            crop=None,
        )


def told(node: LossNode, store: Reinforcement) -> LossNode:
    """``llm/reinforced`` with the store's dimensions, and its scales where the config has none."""
    if named([node.use]) != {"reinforced"}:
        return node
    settings = node.settings | {"dims": store.dims, "scales": node.settings.get("scales") or store.scales}
    return LossNode(use=node.use, **settings)
