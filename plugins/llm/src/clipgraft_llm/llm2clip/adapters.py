"""Low-rank adapters of peft in a language model, and how they become plain weights again."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from clipgraft.errors import InputError
from clipgraft_llm.llm2clip.config import LoraConfig


def adapt(model: Any, config: LoraConfig) -> Any:
    """Put adapters into ``model`` in place, the only weights with a gradient from now on; returns peft's wrapper."""
    import peft

    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        bias="none",
        target_modules=list(config.targets) or "all-linear",
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an older name
            return peft.get_peft_model(model, settings)
    except ValueError as error:
        linear = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise InputError(
            f"lora.targets {list(config.targets)} can't be adapted ({str(error).splitlines()[0][:80]}); this model's "
            f"linear layers are {', '.join(linear)}"
        ) from None


def merged(wrapper: Any) -> Any:
    """The model without adapters, its weights changed by them; the same object."""
    return wrapper.merge_and_unload()


def frozen_leaves(model: nn.Module) -> list[nn.Module]:
    """Modules that hold parameters themselves and none with a gradient."""
    return [
        m
        for m in model.modules()
        if list(m.parameters(recurse=False)) and not any(p.requires_grad for p in m.parameters())
    ]
