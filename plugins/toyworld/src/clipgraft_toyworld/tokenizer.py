"""The closed vocabulary as a Hugging Face tokenizer that stock open_clip loads, and as a plain fast encoder."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from clipgraft_toyworld.captions import words

CONTEXT_LENGTH = 32
PUNCTUATION = "[^a-z0-9 ]"
"""What lower-cased text loses before it is split at spaces."""
PAD, UNKNOWN, START, END = "<pad>", "<unk>", "<start>", "<end>"


@functools.cache
def vocabulary() -> dict[str, int]:
    """Token to id: padding 0, unknown 1, the words, start, and end **last**: open_clip pools text at the highest id."""
    tokens = [PAD, UNKNOWN, *words(), START, END]
    return {token: index for index, token in enumerate(tokens)}


def encode(texts: Sequence[str], *, context_length: int = CONTEXT_LENGTH, trim: bool = False) -> Tensor:
    """(B, L) int64 ids as the saved tokenizer gives them; `trim` cuts the padding that all texts share."""
    table = vocabulary()
    unknown, start, end = table[UNKNOWN], table[START], table[END]
    rows = [
        [table.get(word, unknown) for word in re.sub(PUNCTUATION, " ", text.lower()).split()][: context_length - 2]
        for text in texts
    ]
    length = max((len(row) for row in rows), default=0) + 2 if trim else context_length
    return torch.tensor([[start, *row, end] + [0] * (length - 2 - len(row)) for row in rows], dtype=torch.long)


def save_tokenizer(folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, which `open_clip.get_tokenizer("local-dir:...")` reads."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    table = vocabulary()
    tokenizer = Tokenizer(models.WordLevel(table, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(PUNCTUATION), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, table[START]), (END, table[END])]
    )
    tokenizer.add_special_tokens([PAD, UNKNOWN, START, END])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT_LENGTH,
        "padding_side": "right",
        "truncation_side": "right",
        "clean_up_tokenization_spaces": False,
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "bos_token": START,
        "eos_token": END,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
