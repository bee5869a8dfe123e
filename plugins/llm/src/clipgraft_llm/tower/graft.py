"""``llm/transformer-text``: another language model as the text tower of a CLIP."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from clipgraft.errors import InputError
from clipgraft_llm.tower.settings import TextModelConfig, TextSettings, settled

if TYPE_CHECKING:
    from clipgraft.encoders.base import Encoder
    from clipgraft_llm.tower.text_tower import LlmText

NAME = "llm/transformer-text"
Projection = Literal["linear", "residual"]


class TransformerText(TextModelConfig):
    """Replace the text tower by a frozen language model and a projection that is to be trained.

    ``weights: reference`` keeps the language model out of exports, which hold the fingerprint of its files; a model
    that changed or is gone is refused. ``stored`` writes it into the export, which then needs nothing else.
    """

    portable: ClassVar[bool] = False

    projection: Projection = Field("residual", description="of text features: residual blocks, or one linear map")
    blocks: int = Field(4, gt=0, description="residual blocks")
    input_norm: bool = Field(True, description="text features of length one before the projection")
    joint: int | None = Field(None, gt=0, description="joint embedding [dimensions]; null: the image tower's own")
    reset_visual: bool = Field(False, description="draw the image tower's projection anew, as a new joint space does")
    weights: Literal["reference", "stored"] = Field(
        "reference", description="of the language model in exports: pinned by fingerprint, or written into them"
    )

    def apply(self, encoder: Encoder) -> Encoder:
        """Put the tower in; the projection's weights are drawn from torch's global generator."""
        from clipgraft_llm.tower.visual import reset_projection

        width = encoder.image.embed_dim
        if self.reset_visual or (self.joint is not None and self.joint != width):
            reset_projection(encoder, embed_dim=self.joint or width)
        elif self.weights == "stored" and not encoder.data.model_config:
            raise InputError("weights: stored needs a CLIP that open_clip could hold; use weights: reference")
        encoder.text = self._tower(encoder)
        encoder.data.tokenizer = encoder.text.tokens
        return encoder

    def merge(self, encoder: Encoder) -> Encoder:
        """Nothing to fold."""
        return encoder

    def _tower(self, encoder: Encoder) -> LlmText:
        """From the model's directory; from the export itself when an export that holds the model is opened."""
        from clipgraft_llm.tower.caption_tokens import CaptionTokenizer, read_tokenizer
        from clipgraft_llm.tower.language_model import DTYPES, LanguageModel, from_config, read_language_model
        from clipgraft_llm.tower.model_folder import ARCHITECTURE, OWN, find_model
        from clipgraft_llm.tower.text_proj import TextProj
        from clipgraft_llm.tower.text_tower import LlmText, Referred

        home, own = Path(encoder.data.origin.uri), None
        if self.weights == "stored" and not isinstance(encoder.text, LlmText):
            own = json.loads((home / ARCHITECTURE).read_text("utf-8")) if (home / ARCHITECTURE).is_file() else None
        embed_dim = encoder.image.embed_dim
        blocks = self.blocks if self.projection == "residual" else 0
        if own is not None:
            from transformers import AutoConfig

            settings = TextSettings(**json.loads((home / OWN).read_text("utf-8")))
            tokens = CaptionTokenizer(read_tokenizer(home, where=str(home)), settings=settings)
            model = from_config(AutoConfig.for_model(**own), seed=0, dtype=DTYPES[settings.dtype])
            language: Any = LanguageModel(model, tokens=tokens).requires_grad_(False).eval()
            pin = ""
        else:
            folder = find_model(self.model)
            settings = settled(self, folder)
            tokens = CaptionTokenizer.of(folder, settings)
            if settings.random is None:
                assert folder.weights
            read = partial(read_language_model, folder, settings)
            language, pin = (read(), "") if self.weights == "stored" else (Referred(read), folder.fingerprint())
        projection = TextProj(settings.width, embed_dim, blocks=blocks, input_norm=self.input_norm)
        tower = LlmText(language, projection, tokens=tokens, embed_dim=embed_dim, fingerprint=pin, reference=self.model)
        if self.weights == "stored":
            tokens.architecture = language.model.config.to_dict()
        return tower.to(encoder.logit_scale.device)
