"""Official Long-CLIP checkpoints as encoders: the two position tables become one, which open_clip can hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipgraft.encoders.base import Encoder, Origin
from clipgraft.encoders.openclip import build, read_weights
from clipgraft.errors import InputError

KEPT = 20
"""Rows of the table that official training leaves alone."""
FROZEN, TRAINED = "positional_embedding", "positional_embedding_res"
EXTRA = ("input_resolution", "context_length", "vocab_size")
"""Numbers beside the weights in files that descend from OpenAI's."""
KNOWN = {(768, 16): "ViT-B-16-quickgelu", (1024, 14): "ViT-L-14-quickgelu", (768, 32): "ViT-B-32-quickgelu"}
"""(width, patch size) of the image tower -> open_clip's architecture."""


def merged_state(state: Mapping[str, Tensor], *, where: str, keep: int = KEPT) -> dict[str, Tensor]:
    """A checkpoint's tensors with one table (T, W): rows before ``keep`` of the frozen one, the rest trained."""
    plain = {name.removeprefix("module."): value for name, value in state.items()}
    if FROZEN not in plain or TRAINED not in plain:
        raise InputError(
            f"{where} has no {FROZEN if FROZEN not in plain else TRAINED}; expected an official Long-CLIP checkpoint "
            "with both (a model in open_clip's format opens as it is)"
        )
    frozen, trained = plain[FROZEN], plain.pop(TRAINED)
    if frozen.shape != trained.shape or len(frozen) <= keep:
        raise InputError(f"{where}: tables of {tuple(frozen.shape)} and {tuple(trained.shape)}; expected two alike")
    plain[FROZEN] = torch.cat([frozen[:keep], trained[keep:]])
    return {name: value for name, value in plain.items() if name not in EXTRA}


def architecture(state: Mapping[str, Tensor], *, where: str) -> str:
    """The open_clip architecture whose image tower has these shapes."""
    weight = state.get("visual.conv1.weight")
    shape = () if weight is None else (weight.shape[0], weight.shape[-1])
    if shape not in KNOWN:
        raise InputError(f"{where}: its image tower is none of {', '.join(KNOWN.values())}; name one with --arch")
    return KNOWN[shape]


def official_encoder(file: Path, *, config: Mapping[str, Any] | None = None, keep: int = KEPT) -> Encoder:
    """The model of an official .pt file, read without unpickling anything but tensors.

    ``config`` is open_clip's ``model_cfg``; without it shapes tell the architecture. Preprocessing is OpenAI's.
    """
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    state = merged_state(read_weights(file), where=str(file), keep=keep)
    name = "given" if config else architecture(state, where=str(file))
    known = dict(config or open_clip.get_model_config(name))
    known["text_cfg"] = {**known["text_cfg"], "context_length": len(state[FROZEN])}
    preprocess = get_pretrained_cfg("ViT-B-16-quickgelu", "openai")
    return build(known, state, preprocess=preprocess, origin=Origin(str(file), f"Long-CLIP {name}"))
