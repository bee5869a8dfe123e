"""``llm/stretch-positions``: a text tower that reads on, with its first positions kept as they are."""

from __future__ import annotations

from dataclasses import is_dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from clipgraft.config.schema import Config
from clipgraft.errors import InputError
from clipgraft_llm.longclip.positions import interpolation_matrix, stretch_matrix, stretched, stretched_length

if TYPE_CHECKING:
    from clipgraft.encoders.base import Encoder, Tokenizer

NAME = "llm/stretch-positions"
POSITIONS = "positional_embedding"


class KeptRows(nn.Module):
    """Trained positions (T - k, W) -> all positions (T, W), the first k of which are a buffer: they get no gradient."""

    kept: Tensor

    def __init__(self, positions: Tensor, *, keep: int) -> None:
        super().__init__()
        self.register_buffer("kept", positions[:keep].detach().clone())

    def forward(self, trained: Tensor) -> Tensor:
        """(T - k, W) -> (T, W)."""
        return torch.cat([self.kept.to(trained.dtype), trained])

    def right_inverse(self, positions: Tensor) -> Tensor:
        """(T, W) -> (T - k, W)."""
        return positions[len(self.kept) :].clone()


class StretchPositions(Config):
    """Longer texts: positions behind the first ``keep`` are stretched; mask, tokenizer and configuration follow."""

    keep: int = Field(20, ge=0, description="positions that stay as they are, frozen [tokens]")
    ratio: int = Field(4, ge=2, description="new positions for each old one behind the kept ones")
    context: int | None = Field(None, gt=0, description="length of the new context; null: what keep and ratio give")
    method: Literal["preserve", "interpolate"] = Field(
        "preserve", description="interpolate resamples all positions alike and trains all: a control"
    )

    def apply(self, encoder: Encoder) -> Encoder:
        """Stretch in place: texts of up to ``keep`` tokens have the embeddings that they had, to the bit."""
        from clipgraft.encoders.towers import ClipText

        text = encoder.text
        if not isinstance(text, ClipText):
            kind = "no text tower" if text is None else f"a {type(text).__name__} text tower"
            raise InputError(
                f"{NAME} stretches the position table of open_clip's own text tower, {encoder.data.origin.uri} has "
                f"{kind}; use a CLIP with one (language models have long contexts: set text_cfg.context_length)"
            )
        tower: Any = text.tower
        if not text.trim_exact:
            raise InputError(
                f"{NAME} needs a causal text tower that pools at the end token; in {encoder.data.origin.uri} padding "
                "reaches the embedding, so a longer context changes every text; use a CLIP in OpenAI's layout"
            )
        if parametrize.is_parametrized(tower, POSITIONS):
            raise InputError(f"{NAME} is listed twice; stretch once, with the context that you want")
        old: nn.Parameter = tower.positional_embedding
        length, context = len(old), self._context(len(old))
        if self.method == "preserve":
            new = stretched(old, stretch_matrix(length, keep=self.keep, context=context))
        else:
            new = stretched(old, interpolation_matrix(length, context=context))
        tokenizer = lengthened(encoder.tokenizer, context)
        tower.positional_embedding = nn.Parameter(new, requires_grad=old.requires_grad)
        if self.method == "preserve" and self.keep:
            rows = KeptRows(new, keep=self.keep).train(tower.training)
            parametrize.register_parametrization(tower, POSITIONS, rows, unsafe=True)
        tower.context_length = tower.num_pos = text.context_length = context
        tower.attn_mask = tower.build_causal_mask().to(old.device)
        encoder.data.tokenizer = tokenizer
        encoder.data.model_config["text_cfg"]["context_length"] = context
        return encoder

    def _context(self, length: int) -> int:
        """T, after a look at what was asked."""
        if self.keep > length - 2:
            raise InputError(f"{NAME}: keep {self.keep} of {length} positions leaves none to stretch; lower keep")
        context = self.context or stretched_length(length, keep=self.keep, ratio=self.ratio)
        if context <= length:
            raise InputError(
                f"{NAME}: this model reads {length} tokens already, context {context} is not longer; set context to "
                f"{length + 1} or more, or remove the graft"
            )
        return context

    def merge(self, encoder: Encoder) -> Encoder:
        """One plain table again: kept and trained rows under each other, exactly."""
        tower: Any = getattr(encoder.text, "tower", None)
        if tower is None or not parametrize.is_parametrized(tower, POSITIONS):
            return encoder
        cls = type(tower)  # a deep copy shares its class with the original, and removal takes the property off it
        own = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
        tower.__class__ = type(cls.__name__, cls.__bases__, own)
        parametrize.remove_parametrizations(tower, POSITIONS, leave_parametrized=True)
        return encoder


def lengthened(tokenizer: Tokenizer, context: int) -> Tokenizer:
    """The same tokenizer with another ``context_length``."""
    if not is_dataclass(tokenizer) or isinstance(tokenizer, type):
        raise InputError(f"{NAME}: the context of a {type(tokenizer).__name__} can't be changed; use CLIP's tokenizer")
    return replace(tokenizer, context_length=context)  # type: ignore[type-var, return-value]
