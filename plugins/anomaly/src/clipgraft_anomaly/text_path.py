"""The text tower fed with embeddings instead of words, and with deep tokens that overwrite hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clipgraft.encoders.base import TextEncoder
from clipgraft.encoders.towers import ClipText
from clipgraft.errors import InputError


def why_not_prompted(text: TextEncoder | None) -> str:
    """Why learnt prompts can't go into this text tower; empty when they can."""
    if text is None:
        return "learnt prompts need a text tower, this model has none; choose a whole CLIP"
    if not isinstance(text, ClipText) or text.tower.attn_mask is None:
        return "learnt prompts need open_clip's own causal text tower; SigLIP and Hugging Face differ"
    if text.tower.pool_type not in ("argmax", "eos"):
        return f"learnt prompts are read at the end token; this text tower pools by {text.tower.pool_type}"
    return ""


def encode_embeddings(
    text: TextEncoder,
    embedded: Tensor,
    end: Tensor,
    *,
    deep: Sequence[Tensor] = (),
    legacy_half: bool = False,
) -> Tensor:
    """Token embeddings (P, L, V) without positions, end positions (P,) -> joint embeddings (P, D), not normalised.

    ``deep`` are tokens (n, V) that overwrite hidden positions 1..n before blocks 2, 3, and so on, one per block; they
    get no position embedding (AnomalyCLIP, official code). ``legacy_half`` rounds them to fp16, as that code does.
    Gradients reach ``embedded`` and ``deep`` through the frozen tower.
    """
    if problem := why_not_prompted(text):
        raise InputError(problem)
    tower: Any = text.tower
    length, blocks = embedded.shape[1], tower.transformer.resblocks
    if length > text.context_length:
        raise InputError(f"a prompt of {length} tokens doesn't fit a text tower of {text.context_length}; shorten it")
    if len(deep) >= len(blocks):
        raise InputError(f"{len(deep)} deep tokens need {len(deep) + 1} text layers, this tower has {len(blocks)}")
    x = embedded + tower.positional_embedding[:length]
    mask = tower.attn_mask[:length, :length].to(x.dtype)
    for index, block in enumerate(blocks):
        if 1 <= index <= len(deep):
            token = deep[index - 1]
            token = token.half().to(x.dtype) if legacy_half else token.to(x.dtype)
            rows = token.expand(len(x), -1, -1)
            x = torch.cat([x[:, :1], rows, x[:, 1 + len(token) :]], 1)
        x = block(x, attn_mask=mask)
    pooled = tower.ln_final(x)[torch.arange(len(x), device=x.device), end]
    projection = tower.text_projection
    if projection is None:
        return pooled  # type: ignore[no-any-return]
    result: Tensor = projection(pooled) if isinstance(projection, torch.nn.Linear) else pooled @ projection
    return result
