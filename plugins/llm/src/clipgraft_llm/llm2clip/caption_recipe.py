"""LLM2CLIP's first stage as a recipe of its own: any language model becomes one that tells captions apart."""

from __future__ import annotations

from dataclasses import replace

from clipgraft.errors import ClipgraftError
from clipgraft.recipe import StagePlan
from clipgraft.runner import Run
from clipgraft_llm.llm2clip.caption_pairs import CaptionPairs, PairTokenizer, why_no_captions
from clipgraft_llm.llm2clip.caption_stage import CaptionStage
from clipgraft_llm.llm2clip.config import CaptionContrastConfig
from clipgraft_llm.llm2clip.recipe import with_tokenizer
from clipgraft_llm.tower.caption_tokens import CaptionTokenizer
from clipgraft_llm.tower.model_folder import SCHEME
from clipgraft_llm.tower.settings import TextModelConfig
from clipgraft_llm.tower.text_only import text_encoder


class CaptionContrast:
    """One stage, ``captions``. The run's model is the text model alone."""

    def __init__(self, config: CaptionContrastConfig) -> None:
        self.config = config

    def plan(self) -> list[StagePlan]:
        """The stage."""
        return [StagePlan("captions", self._captions)]

    def check(self, run: Run) -> list[str]:
        """A text model that can be asked as configured, and two captions per sample, seen before any work."""
        c = self.config
        if not c.model.from_.startswith(SCHEME):
            return [f"model.from: {c.model.from_} is no text model; write llm:DIR, llm:ORG/NAME or llm:plugin/head"]
        if c.grafts:
            return ["grafts change CLIPs, this recipe trains a text model alone; leave them out"]
        problems = []
        try:
            run.encoder = text_encoder(self._asked()).to(run.device).eval()
            settings = run.encoder.tokenizer.settings
            if c.instruction and settings.over != "caption":
                problems.append("instruction: it would be pooled with the caption; set text.over to caption")
        except ClipgraftError as error:
            problems.append(str(error))
        if problem := why_no_captions(run.train_source(), needed=2):
            problems.append(f"data: {problem}")
        if c.train.batch_size < 2:
            problems.append("train.batch_size: other captions are needed; set it to 2 or more")
        return problems

    def _asked(self) -> TextModelConfig:
        return TextModelConfig(model=self.config.model.from_, **self.config.text.model_dump())

    def _captions(self, run: Run) -> CaptionStage:
        c, encoder = self.config, text_encoder(self._asked(), trainable=True).to(run.device)
        tokens: CaptionTokenizer = encoder.tokenizer
        instructed = None
        if c.instruction:
            before, after = tokens.settings.template.split("{}")
            settings = replace(tokens.settings, template=f"{before}{c.instruction}{{}}{after}")
            instructed = CaptionTokenizer(tokens.inner, settings=settings)
        pairs = PairTokenizer(tokens, instructed=instructed)
        run.encoder = with_tokenizer(encoder, pairs)
        return CaptionStage(
            "captions",
            train=c.train,
            source=CaptionPairs(run.train_source(), negatives=c.negatives, seed=run.seed, log=run.log),
            encoder=encoder,
            pairs=pairs,
            lora=c.lora,
            scale=c.scale,
            recompute=c.recompute,
        )
