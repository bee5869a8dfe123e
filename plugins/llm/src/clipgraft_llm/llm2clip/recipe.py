"""LLM2CLIP's second stage as a recipe (Huang et al., LLM2CLIP: Powerful Language Model Unlocks Richer Visual

Representation, arXiv 2411.04997): a frozen text model's features, a projection, and an image tower that learns them.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from clipgraft.encoders.base import AppliedGraft, Encoder, Tokenizer
from clipgraft.errors import ClipgraftError
from clipgraft.recipe import StagePlan
from clipgraft.runner import Run
from clipgraft.stage import JobStage, StageResult
from clipgraft_llm.cache.build import build_cache
from clipgraft_llm.cache.reader import FeatureCache, FeatureLookup, covered
from clipgraft_llm.llm2clip.caption_pairs import why_no_captions
from clipgraft_llm.llm2clip.config import Llm2ClipConfig
from clipgraft_llm.llm2clip.vision_stage import VisionStage
from clipgraft_llm.tower.graft import NAME
from clipgraft_llm.tower.language_model import read_language_model
from clipgraft_llm.tower.model_folder import ModelFolder, find_model
from clipgraft_llm.tower.settings import TextSettings, settled

FEATURES = "text-features"
"""Where in its directory a run keeps a cache that it makes."""


class Llm2Clip:
    """``features`` where the run makes its own cache, then ``vision``."""

    def __init__(self, config: Llm2ClipConfig) -> None:
        self.config = config

    def plan(self) -> list[StagePlan]:
        """The stages."""
        own = self.config.cache.use == "cached" and self.config.cache.folder is None
        return [StagePlan("features", self._features)] * own + [StagePlan("vision", self._vision)]

    def check(self, run: Run) -> list[str]:
        """A text model that can be asked, a cache of its features, captions, a joint space: seen before any work."""
        problems = []
        try:
            folder, settings = self._model(run)
            assert folder.weights
            if (place := self.config.cache.folder) is not None:
                FeatureCache(Path(place)).require(folder=folder, settings=settings)
        except ClipgraftError as error:
            problems.append(str(error))
        if problem := why_no_captions(run.train_source(), needed=1):
            problems.append(f"data: {problem}")
        if self.config.train.batch_size < 2:
            problems.append("train.batch_size: other captions are needed; set it to 2 or more")
        return problems

    def _model(self, run: Run) -> tuple[ModelFolder, TextSettings]:
        folder = find_model(self.config.text.model, registry=run.registry)
        return folder, settled(self.config.text, folder)

    def _features(self, run: Run) -> JobStage:
        return JobStage("features", self._build_cache)

    def _build_cache(self, run: Run) -> StageResult:
        folder, settings = self._model(run)
        cache = self.config.cache
        built = build_cache(
            run.train_source(),
            run.path / FEATURES,
            folder=folder,
            settings=settings,
            read=partial(read_language_model, folder, settings),
            log=run.log,
            stored=cache.stored,
            rows=cache.rows,
            batch_size=cache.batch_size,
            device=run.device,
        )
        if built.cut:
            run.log.info(
                f"{built.cut} of {built.captions} captions are longer than {settings.max_length} tokens and lost words "
                f"at their end, such as {', '.join(built.first_cut[:3])}; raise text.max_length to keep them"
            )
        return StageResult(metrics={"captions": built.captions, "cut": built.cut, "skipped": built.skipped})

    def _vision(self, run: Run) -> VisionStage:
        c, encoder, source = self.config, run.encoder, run.train_source()
        encoder = c.text.apply(encoder)
        settings = c.text.model_dump(mode="json")
        encoder.data.grafts.append(AppliedGraft(NAME, settings, c.text, portable=False))
        if c.reset_scale:
            with torch.no_grad():
                encoder.logit_scale.fill_(math.log(1 / 0.07))
        if c.cache.use == "cached":
            cache = FeatureCache(Path(c.cache.folder) if c.cache.folder else run.path / FEATURES)
            folder, asked = self._model(run)
            cache.require(folder=folder, settings=asked)
            source = covered(source, cache, log=run.log)
            run.encoder = with_tokenizer(encoder, FeatureLookup(cache))
        return VisionStage(
            "vision",
            train=c.train,
            source=source,
            encoder=encoder,
            train_image=c.train_image,
            visual_decay=c.visual_decay,
            compat=c.compat,
            max_logit_scale=c.max_logit_scale,
        )


def with_tokenizer(encoder: Encoder, tokenizer: Tokenizer) -> Encoder:
    """The same towers under another tokenizer: what the training loader should see while ``encoder`` keeps its own."""
    other = copy.copy(encoder)
    other.data = replace(encoder.data, tokenizer=tokenizer)
    return other
