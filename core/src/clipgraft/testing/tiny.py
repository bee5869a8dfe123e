"""Tiny CLIPs with random weights, built from open_clip's classes, and a tokenizer that needs no download."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from clipgraft.encoders.base import Encoder

WORDS = (
    "a an the of photo picture image with and in on red green blue yellow purple orange white black circle square "
    "triangle star cat dog car zero one two three four five six seven eight nine small large left right up down"
)


class TinyTokenizer:
    """Known words are one id, others are spelt; lower case; the end token is the highest id, padding is 0.

    Saved as Hugging Face files, so that an export of a tiny model opens in open_clip with its tokenizer.
    """

    pad_id = 0

    def __init__(self, *, context_length: int = 16, vocab: int = 128) -> None:
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

        letters = string.ascii_lowercase + string.digits
        words = ["[PAD]", "[UNK]", *dict.fromkeys([*letters, *WORDS.split()]), *(f"##{c}" for c in letters)]
        words = [*words[: vocab - 2], *(f"[unused{i}]" for i in range(vocab - 2 - len(words)))]
        ids = {word: i for i, word in enumerate([*words, "[SOT]", "[EOT]"])}
        self.context_length = context_length
        self.inner = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
        self.inner.normalizer = normalizers.Lowercase()
        self.inner.pre_tokenizer = pre_tokenizers.Whitespace()
        special = [("[SOT]", ids["[SOT]"]), ("[EOT]", ids["[EOT]"])]
        self.inner.post_processor = processors.TemplateProcessing(single="[SOT] $A [EOT]", special_tokens=special)
        self.inner.enable_truncation(context_length)
        self.inner.enable_padding(length=context_length, pad_id=0, pad_token="[PAD]")

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(B, context_length) int64."""
        return torch.tensor([e.ids for e in self.inner.encode_batch(list(texts))], dtype=torch.long)

    def save(self, folder: str) -> None:
        """tokenizer.json and tokenizer_config.json."""
        self.inner.save(str(Path(folder) / "tokenizer.json"))
        names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[SOT]", "eos_token": "[EOT]"}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
        Path(folder, "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def tiny_clip(
    seed: int = 0,
    *,
    kind: Literal["vit", "custom-text", "siglip-timm"] = "vit",
    image_size: int = 32,
    patch: int = 8,
    width: int = 32,
    depth: int = 2,
    embed: int = 16,
    context: int = 16,
    vocab: int = 128,
) -> Encoder:
    """A random CLIP of some 60,000 weights; the same seed gives the same weights, the global generator is left alone.

    ``siglip-timm``: a timm tower with attention pooling, a bidirectional text tower, and a logit bias; it is smaller
    than any timm model with a name, so open_clip can't hold it (an L2 export). ``embed`` is ``width`` there.
    """
    from clipgraft.encoders.base import Origin
    from clipgraft.encoders.openclip import build

    vision: dict[str, Any] = {"image_size": image_size, "patch_size": patch, "width": width, "layers": depth}
    text: dict[str, Any] = {"context_length": context, "vocab_size": vocab, "width": width, "heads": 2, "layers": depth}
    config: dict[str, Any] = {"embed_dim": embed, "vision_cfg": {**vision, "head_width": width // 2}}
    config["text_cfg"] = {**text, "hf_tokenizer_name": "tiny"}
    if kind == "siglip-timm":
        sizes = {"img_size": image_size, "patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": 2}
        timm = {"timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "map", "timm_proj": "none"}
        config |= {"embed_dim": width, "init_logit_bias": -10, "custom_text": True}
        config["vision_cfg"] = {"image_size": image_size, **timm, "timm_kwargs": sizes}
        config["text_cfg"] |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    elif kind == "custom-text":
        config["custom_text"] = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(
            config,
            None,
            preprocess={"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
            tokenizer=TinyTokenizer(context_length=context, vocab=vocab),
            origin=Origin(f"tiny:{kind}/{seed}", "tiny"),
        )
