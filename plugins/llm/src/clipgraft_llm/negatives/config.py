"""Settings of ``llm/negclip``."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from clipgraft.config.schema import Config
from clipgraft.finetune import FinetuneConfig
from clipgraft_llm.negatives.rules import RULES, Rule


class NegativesConfig(Config):
    """Where wrong captions come from."""

    made: Literal["rules", "source", "file", "none"] = Field(
        "rules",
        description="rules: of the caption by rule; source: the data brings them; file: see clipgraft llm negatives; "
        "none: a control, CLIP's loss on the same batches",
    )
    rules: tuple[Rule, ...] = Field(RULES, min_length=1, description="which rules, for made: rules")
    file: str | None = Field(None, description="JSON lines with id, caption, negatives, for made: file")
    per_caption: int = Field(1, gt=0, description="wrong captions of each caption, drawn anew in every epoch")

    @model_validator(mode="after")
    def _file_goes_with_made(self) -> Self:
        if (self.made == "file") != (self.file is not None):
            raise ValueError("made: file and file: PATH go together; give both or neither")
        return self


class NegClipConfig(FinetuneConfig):
    """``llm/negclip``."""

    negatives: NegativesConfig = NegativesConfig()
    rehearse: str | None = Field(
        None, description="data reference: captioned pictures of what should not be forgotten, as many epochs of both"
    )
    crop: tuple[float, float] | None = Field(
        (0.9, 1.0), description="area range of the random crop of training images; null takes the whole image"
    )
    shuffled: bool = Field(False, description="a control: every caption gets the picture of another one of its batch")
