"""The counting recipe: one stage, ``train``, of which an exact share are captions with a number.

Paiss et al., Teaching CLIP to Count to Ten, ICCV 2023, arXiv 2302.12066.
"""

from __future__ import annotations

from pathlib import Path

from clipgraft.errors import InputError
from clipgraft.finetune import Finetune
from clipgraft.recipe import StagePlan
from clipgraft.runner import Run
from clipgraft_llm.counting.config import CountRunConfig
from clipgraft_llm.counting.mixture import Counting
from clipgraft_llm.named_recipe import built, named, teacher_of
from clipgraft_llm.named_stage import NamedStage


class CountToTen:
    """One stage."""

    def __init__(self, config: CountRunConfig) -> None:
        self.config = config

    def plan(self) -> list[StagePlan]:
        """The stage."""
        return [StagePlan("train", self._train)]

    def check(self, run: Run) -> list[str]:
        """Losses, and captions with a number."""
        problems = Finetune(self.config).check(run)
        try:
            self._source(run)
        except InputError as error:
            problems.append(str(error))
        if not named(node.use for node in self.config.losses) & {"negclip", "count"}:
            problems.append("losses: none of them reads changed captions; list llm/count, or run core/finetune")
        return problems

    def _source(self, run: Run) -> Counting:
        c = self.config.counting
        return Counting(
            run.train_source(),
            tokenizer=run.encoder.tokenizer,
            share=c.share,
            verified=None if c.verified is None else _ids(c.verified),
            count=c.per_caption,
            log=run.log,
        )

    def _train(self, run: Run) -> NamedStage:
        c = self.config
        losses, weights = built(run, c)
        return NamedStage(
            "train",
            train=c.train,
            source=self._source(run),
            encoder=run.encoder,
            losses=losses,
            weights=weights,
            teacher=teacher_of(run, c.teacher),
            max_logit_scale=c.max_logit_scale,
            more=("negatives",),
            crop=c.crop,
        )


def _ids(path: str) -> frozenset[str]:
    try:
        lines = Path(path).expanduser().read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise InputError(
            f"counting.verified: {path} can't be read ({reason}); expected one sample id per line"
        ) from None
    return frozenset(line.strip() for line in lines if line.strip())
