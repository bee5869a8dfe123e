"""NegCLIP's recipe: one stage, ``train`` (Yuksekgonul et al., When and Why Vision-Language Models Behave like

Bags-Of-Words, and What to Do About It?, ICLR 2023, arXiv 2210.01936).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from clipgraft.data.base import BadSample, Sample, Source
from clipgraft.errors import InputError
from clipgraft.finetune import Finetune
from clipgraft.recipe import StagePlan
from clipgraft.runner import Run
from clipgraft_llm.named_recipe import LOOKED_AT, built, named, teacher_of, uncaptioned
from clipgraft_llm.named_stage import NamedStage
from clipgraft_llm.negatives.config import NegativesConfig, NegClipConfig
from clipgraft_llm.negatives.rehearsal import Rehearsing
from clipgraft_llm.negatives.rules import Rule, drawn
from clipgraft_llm.negatives.source import Wrong, with_negatives
from clipgraft_llm.negatives.written import Written


class NegClip:
    """One stage over captions and their wrong ones."""

    def __init__(self, config: NegClipConfig) -> None:
        self.config = config

    def plan(self) -> list[StagePlan]:
        """The stage."""
        return [StagePlan("train", self._train)]

    def check(self, run: Run) -> list[str]:
        """Losses, captions, and a source of wrong captions that has some."""
        problems = Finetune(self.config).check(run)
        try:
            run.encoder.tokenizer  # noqa: B018, an encoder without text tower says so
            source = self._source(run)
            problems += [line] if (line := uncaptioned(source)) else []
            problems += [] if line else self._without(source)
        except InputError as error:
            problems.append(str(error))
        if not named(node.use for node in self.config.losses) & {"negclip", "count"}:
            problems.append("losses: none of them reads wrong captions; list llm/negclip, or run core/finetune")
        return problems

    def _without(self, source: Source) -> list[str]:
        """A line when none of the first samples gets a wrong caption."""
        wrong, seen = maker(self.config.negatives)[0], 0
        for index in range(min(len(source), LOOKED_AT)):
            try:
                sample = source[index]
            except BadSample:
                continue
            seen += 1
            if any(wrong(sample, caption, random.Random(0)) for caption in sample.captions):
                return []
        if not seen or self.config.negatives.made in ("file", "none"):
            return []  # a file may cover a part of the data; the stage's terms show what it does
        say = {
            "source": "set negatives.made to rules, or take data whose samples have negatives",
            "rules": "add rules, or give a file (clipgraft llm negatives)",
        }[self.config.negatives.made]
        return [f"negatives: no wrong caption for the first {seen} samples of {source.name}; {say}"]

    def _source(self, run: Run) -> Source:
        source, also = run.train_source(), self.config.rehearse
        return source if also is None else Rehearsing(source, run.open_source(also))

    def _train(self, run: Run) -> NamedStage:
        c = self.config
        (wrong, told), (losses, weights) = maker(c.negatives), built(run, c)
        return NamedStage(
            "train",
            train=c.train,
            source=with_negatives(
                self._source(run),
                tokenizer=run.encoder.tokenizer,
                wrong=wrong,
                count=c.negatives.per_caption,
                told=told,
            ),
            encoder=run.encoder,
            losses=losses,
            weights=weights,
            teacher=teacher_of(run, c.teacher),
            max_logit_scale=c.max_logit_scale,
            more=("negatives",),
            crop=c.crop,
            shuffled=c.shuffled,
        )


def maker(config: NegativesConfig) -> tuple[Wrong, str]:
    """What makes wrong captions, and the same in words."""
    if config.made == "file":
        assert config.file is not None
        written = Written(config.file)
        return written, f"file {written.sha256}"
    if config.made != "rules":
        return (_given, "source") if config.made == "source" else (_nothing, "none")

    return ByRule(config.rules, config.per_caption), f"rules {config.rules}"


@dataclass(frozen=True, slots=True)
class ByRule:
    """Wrong captions by rule."""

    rules: Sequence[Rule]
    count: int

    def __call__(self, sample: Sample, caption: str, rng: random.Random) -> Sequence[str]:
        """At most ``count``."""
        return drawn(caption, self.rules, self.count, rng=rng)


def _given(sample: Sample, caption: str, rng: random.Random) -> Sequence[str]:
    return rng.sample(sample.negatives, len(sample.negatives))


def _nothing(sample: Sample, caption: str, rng: random.Random) -> Sequence[str]:
    return ()
