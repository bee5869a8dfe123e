"""CLIP-Refine's recipe: one short stage, ``train``, over captions, with a frozen copy of the model beside it.

Yamaguchi et al., Post-pre-training for Modality Alignment in Vision-Language Foundation Models, CVPR 2025, arXiv
2504.12717.
"""

from __future__ import annotations

from clipgraft.errors import InputError
from clipgraft.finetune import Finetune
from clipgraft.recipe import StagePlan
from clipgraft.runner import Run
from clipgraft_llm.named_recipe import built, named, teacher_of, uncaptioned
from clipgraft_llm.named_stage import NamedStage
from clipgraft_llm.refine.config import RefineConfig


class ClipRefine:
    """One stage. Deviation: the teacher is in eval mode and frozen; upstream only keeps it out of the graph."""

    def __init__(self, config: RefineConfig) -> None:
        self.config = config

    def plan(self) -> list[StagePlan]:
        """The stage."""
        return [StagePlan("train", self._train)]

    def check(self, run: Run) -> list[str]:
        """Losses, captions, and a teacher where a loss needs one."""
        problems = Finetune(self.config).check(run)
        try:
            run.encoder.tokenizer  # noqa: B018, an encoder without text tower says so
            problems += [line] if (line := uncaptioned(run.train_source())) else []
        except InputError as error:
            problems.append(str(error))
        if "hycd" in named(node.use for node in self.config.losses) and self.config.teacher is None:
            problems.append("llm/hycd learns from a teacher; set teacher to base or to a model reference")
        return problems

    def _train(self, run: Run) -> NamedStage:
        c = self.config
        losses, weights = built(run, c)
        return NamedStage(
            "train",
            train=c.train,
            source=run.train_source(),
            encoder=run.encoder,
            losses=losses,
            weights=weights,
            teacher=teacher_of(run, c.teacher),
            max_logit_scale=c.max_logit_scale,
            reference=True,
            crop=c.crop,
        )
