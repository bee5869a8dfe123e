"""Stage 1: a language model learns that captions of one picture mean the same (LLM2CLIP, section 3.2).

b pairs of a chunk, L tokens, V width of the model.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from clipgraft import distributed, files
from clipgraft.config.schema import TrainConfig
from clipgraft.data.base import Source
from clipgraft.encoders.base import Encoder
from clipgraft.runner import Run
from clipgraft.stage import ContrastiveStage, StageResult
from clipgraft.types import Batch, StepOutput
from clipgraft_llm.llm2clip.adapters import adapt, frozen_leaves, merged
from clipgraft_llm.llm2clip.caption_pairs import PairTokenizer
from clipgraft_llm.llm2clip.config import LoraConfig
from clipgraft_llm.llm2clip.objective import hard_negative_nll
from clipgraft_llm.tower.model_folder import SCHEME, TUNED, quiet
from clipgraft_llm.tower.settings import TextModelConfig
from clipgraft_llm.tower.text_only import text_encoder
from clipgraft_llm.tower.text_tower import LlmText


class CaptionStage(ContrastiveStage):
    """Trains the language model of ``encoder``, which holds it; with ``lora`` its adapters alone.

    ``Batch.text`` (B, 2 or 3, L): query, positive and maybe negative. Pictures have no part in it.
    """

    wants_text = True
    training_crop = None

    def __init__(
        self,
        name: str,
        *,
        train: TrainConfig,
        source: Source,
        encoder: Encoder,
        pairs: PairTokenizer,
        lora: LoraConfig | None,
        scale: float = 50.0,
        recompute: bool = False,
    ) -> None:
        super().__init__(name, train=train, source=source)
        self.encoder: Encoder = encoder.requires_grad_(False)
        self.pairs, self.scale = pairs, scale
        model = self.text.language.model
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._wrapper = None
        if lora is None:
            model.requires_grad_(True)
        else:
            self._wrapper = (adapt(model, lora),)  # in a tuple: its modules are the encoder's already
        for leaf in frozen_leaves(model):
            self.freeze(leaf)

    @property
    def text(self) -> LlmText:
        """The text tower, whose projection is the identity."""
        return cast(LlmText, self.encoder.text)

    def encode(self, batch: Batch) -> tuple[Tensor, ...]:
        """Queries, positives and maybe negatives, (b, V) each."""
        assert batch.text is not None  # wants_text
        language, (query, *others) = self.text.language, batch.text.unbind(1)
        asked = language(self.pairs.instructed.trim(query), lead=self.pairs.instructed.lead).pooled
        found = language(self.text.trim(torch.cat(others))).pooled
        return asked, *found.split(len(query))

    def loss_from(self, features: tuple[Tensor, ...], batch: Batch) -> StepOutput:
        """One direction, over the batch of all ranks."""
        query, positive, *negative = features
        with torch.autocast(query.device.type, enabled=False):
            found = hard_negative_nll(query, positive, negative[0] if negative else None, scale=self.scale)
        return StepOutput(found["loss"], {"accuracy": found["accuracy"]}, len(batch))

    def current_encoder(self) -> Encoder:
        """The text model as it is now."""
        return self.encoder

    def param_groups(self) -> list[dict[str, Any]]:
        """What has a gradient."""
        return [{"name": "text model", "params": [p for p in self.text.parameters() if p.requires_grad]}]

    def final_metrics(self) -> dict[str, float]:
        """Captions seen, and those that lost words."""
        tokens = {id(t): t for t in (self.pairs.tokens, self.pairs.instructed)}.values()
        return {"captions": float(sum(t.seen for t in tokens)), "cut": float(sum(t.cut for t in tokens))}

    def run(self, run: Run) -> StageResult:
        """Train, then write the model as transformers would, adapters merged, with how it wants to be asked."""
        result = super().run(run)
        folder = (run.path / TUNED).resolve()
        language = self.text.language
        model = merged(self._wrapper[0]) if self._wrapper else language.model
        if run.is_main:
            with files.whole_folder(folder, marker="config.json") as draft, quiet():
                model.save_pretrained(draft)
                language.tokens.save(str(draft))
                for file in draft.glob("*.safetensors"):
                    file.chmod((draft / "config.json").stat().st_mode)
            run.log.info(f"writing {folder}")
        distributed.barrier()
        tuned = text_encoder(TextModelConfig(model=f"{SCHEME}{folder}", dtype=language.settings.dtype))
        return StageResult(tuned.to(run.device).eval(), metrics=result.metrics)
