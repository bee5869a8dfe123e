"""Prompts that the official AnomalyCLIP code trained, read without running anything of the file.

A file holds one dictionary ``prompt_learner`` of 32 tensors. Only exactly these names and shapes are taken; the frozen
token embeddings among them tell whether the model given is the one that the prompts were trained for.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft_anomaly.anomalyclip.prompts import AnomalyClip, PromptConfig
from clipgraft_anomaly.detector import Fits
from clipgraft_anomaly.reading import ReadConfig

PLACEHOLDER = "X"
SIDES = ("pos", "neg")
"""Normal and anomalous, as the file calls them."""


def import_official(file: Path, encoder: Encoder, *, read: ReadConfig | None = None) -> AnomalyClip:
    """The head of an official ``.pth`` for ``encoder``, with its texts computed.

    ``read`` are the settings the prompts are used with; by default the official ones of the released files: the last
    layer at 518 px, value attention from the sixth layer on, sigma 4.
    """
    tensors = _read(file)
    text: Any = encoder.text
    if text is None:
        raise InputError(f"{encoder.data.origin.uri} has no text tower; give the CLIP that the prompts belong to")
    if encoder.data.model_config and not encoder.data.model_config.get("quick_gelu", False):
        raise InputError(
            "the official prompts were trained for OpenAI's weights, which use QuickGELU, and this model doesn't; give "
            "open_clip:ViT-L-14-336-quickgelu/openai"
        )
    context, deep_layers, deep_tokens = _checked(tensors, file, width=text.width, length=text.context_length)
    prompt = PromptConfig(context=context, deep_tokens=deep_tokens, deep_layers=deep_layers, legacy_half=True)
    _same_tokens(tensors, file, encoder, prompt)
    read = (read or ReadConfig(size=518, vv_start=6, sigma=4.0)).resolved(encoder)
    head = AnomalyClip(prompt=prompt.resolved(encoder), read=read, fits=Fits.of(encoder))
    with torch.no_grad():
        head.context.copy_(torch.cat([tensors[f"ctx_{side}"][0] for side in SIDES]))
        for layer in range(deep_layers):
            head.deep[layer].copy_(tensors[f"compound_prompts_text.{layer}"])
    head.settle(encoder)
    return head


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors under ``prompt_learner``."""
    if not file.is_file():
        raise InputError(f"{file} is no file; give an official checkpoint, such as epoch_15.pth")
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise InputError(
            f"{file} is no checkpoint of tensors alone ({str(error).splitlines()[0][:120]}); it is not opened"
        ) from None
    if not isinstance(found, dict) or set(found) != {"prompt_learner"} or not isinstance(found["prompt_learner"], dict):
        raise InputError(f"{file} holds no prompt_learner alone; it is no official AnomalyCLIP checkpoint")
    tensors = dict(found["prompt_learner"])
    if not all(isinstance(value, Tensor) for value in tensors.values()):
        raise InputError(f"{file}: prompt_learner holds more than tensors; it is no official AnomalyCLIP checkpoint")
    return tensors


def _checked(tensors: dict[str, Tensor], file: Path, *, width: int, length: int) -> tuple[int, int, int]:
    """(context, deep layers, deep tokens), after every name and shape was found as it must be."""
    first = tensors.get("ctx_pos", torch.empty(0))
    deep = [name for name in tensors if name.startswith("compound_prompts_text.")]
    if first.ndim != 4 or not deep:
        raise InputError(f"{file} lacks ctx_pos or compound_prompts_text; it is no official checkpoint")
    context, layers = first.shape[2], len(deep)
    tokens = tensors[deep[0]].shape[0] if tensors[deep[0]].ndim == 2 else 0
    dead = tensors.get("compound_prompt_projections.0.bias", torch.empty(0)).shape[0]
    wanted: dict[str, tuple[int, ...]] = {}
    for side in SIDES:
        wanted |= {
            f"ctx_{side}": (1, 1, context, width),
            f"token_prefix_{side}": (1, 1, 1, width),
            f"token_suffix_{side}": (1, 1, length - 1 - context, width),
            f"tokenized_prompts_{side}": (1, 1, length),
        }
    for layer in range(layers):
        wanted |= {
            f"compound_prompts_text.{layer}": (tokens, width),
            f"compound_prompt_projections.{layer}.weight": (dead, width),
            f"compound_prompt_projections.{layer}.bias": (dead,),
        }
    if unknown := sorted(set(tensors) - set(wanted)):
        raise InputError(f"{file} holds {unknown[0]!r}, which no official checkpoint does; it is refused")
    if missing := sorted(set(wanted) - set(tensors)):
        raise InputError(f"{file} lacks {missing[0]!r}; it is no whole official checkpoint")
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != shape:
            raise InputError(
                f"{file}: {name} is {tuple(tensors[name].shape)}, this model needs {shape}; give the model that the "
                "prompts were trained for"
            )
    return context, layers, tokens


def _same_tokens(tensors: dict[str, Tensor], file: Path, encoder: Encoder, prompt: PromptConfig) -> None:
    """The frozen words in the file must be this model's: the same ids, and the same embeddings of them."""
    text: Any = encoder.text
    filler = " ".join([PLACEHOLDER] * prompt.context)
    for side, words in zip(SIDES, (prompt.normal, prompt.anomalous), strict=True):
        ids = encoder.tokenizer([f"{filler} {words}"])
        if not torch.equal(ids[0].int(), tensors[f"tokenized_prompts_{side}"][0, 0].int().cpu()):
            raise InputError(f"{file}: tokenized_prompts_{side} isn't what this model's tokenizer makes of {words!r}")
        with torch.no_grad():
            embedded = text.embed(ids.to(text.tower.positional_embedding.device))[0].float().cpu()
        for name, part in (("prefix", embedded[:1]), ("suffix", embedded[1 + prompt.context :])):
            given = tensors[f"token_{name}_{side}"][0, 0].float()
            if not torch.allclose(given, part, atol=2e-3, rtol=1e-3):  # files of fp16 weights are rounded
                raise InputError(
                    f"{file}: token_{name}_{side} is not this model's token embedding; the prompts were trained for "
                    "another backbone: give that one"
                )
