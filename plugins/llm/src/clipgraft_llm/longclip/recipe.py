"""Long-CLIP's recipe: one stage, ``long`` (Zhang et al., Long-CLIP: Unlocking the Long-Text Capability of CLIP,

ECCV 2024, arXiv 2403.15378). The text tower is lengthened by the graft ``llm/stretch-positions``.
"""

from __future__ import annotations

from clipgraft.errors import ClipgraftError
from clipgraft.recipe import StagePlan
from clipgraft.runner import Run
from clipgraft_llm.longclip.components import inactive
from clipgraft_llm.longclip.config import LongClipConfig
from clipgraft_llm.longclip.stage import LongClipStage
from clipgraft_llm.longclip.two_captions import Looked, look, two_captions


class LongClipRecipe:
    """One stage, ``long``."""

    def __init__(self, config: LongClipConfig) -> None:
        self.config = config

    def plan(self) -> list[StagePlan]:
        """The stage."""
        return [StagePlan("long", self._long)]

    def check(self, run: Run) -> list[str]:
        """A text tower, two captions per image, and components that reduce anything, seen before any work."""
        c, encoder = self.config, run.encoder
        if encoder.text is None:
            return [f"model: {encoder.data.origin.uri} has no text tower; use a CLIP with one"]
        problems = []
        if c.pcm.weight and c.pcm.components is not None:
            size, group = c.train.batch_size, c.pcm.group or c.train.batch_size
            if size % group:
                problems.append(f"pcm.group: batches of {size} don't split into groups of {group}; set a divisor")
            elif problem := inactive(images=group, width=encoder.image.embed_dim, count=c.pcm.components):
                problems.append(
                    f"pcm: {problem}; as it is, nothing is reduced (set train.batch_size, pcm.group or "
                    "pcm.components; null there compares whole images)"
                )
        try:
            found = self._look(run)
        except ClipgraftError as error:
            return [*problems, str(error)]
        if found.problem:
            problems.append(f"data: {found.problem}")
        return problems

    def _look(self, run: Run) -> Looked:
        return look(run.train_source(), tokenizer=run.encoder.tokenizer, short=self.config.captions.short)

    def _long(self, run: Run) -> LongClipStage:
        c, encoder = self.config, run.encoder
        run.log.info(f"context {encoder.tokenizer.context_length}: {self._look(run)}")
        return LongClipStage(
            "long",
            train=c.train,
            source=two_captions(run.train_source(), tokenizer=encoder.tokenizer, short=c.captions.short),
            encoder=encoder,
            pcm=c.pcm,
            smoothing=c.label_smoothing,
            scale=c.scale,
            max_scale=c.max_scale,
            decay_all=c.decay == "all",
            augment=c.augment,
        )
