"""Tiny text models with random weights, in the formats of real ones: for tests and benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from clipgraft_llm.tower.model_folder import quiet

WORDS = (
    "a an the of photo picture with and in on red green blue yellow purple black white circle square triangle star cat "
    "dog car one two three four small large left right up down standing beside not over under near far bright dark"
)
LLAMA_TEMPLATE = "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
"""The prompt of Llama 3's instruction models, as LLM2CLIP puts it around captions."""
SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def write_tiny_llama(folder: Path, *, seed: int = 0, width: int = 32, layers: int = 2, positions: int = 128) -> Path:
    """A decoder with rotary positions and grouped heads, and a byte-level tokenizer with Llama 3's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=[], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([WORDS] * 3, trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    ids = {name: tokenizer.token_to_id(name) for name in SPECIAL}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], ids[SPECIAL[0]])]
    )
    names = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[4], "model_max_length": positions}
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        bos_token_id=ids[SPECIAL[0]],
        eos_token_id=ids[SPECIAL[4]],
    )
    return _write(folder, _drawn(lambda: LlamaForCausalLM(config), seed), tokenizer, names)


def write_tiny_embedder(
    folder: Path, *, seed: int = 0, width: int = 32, pooling: str = "mean", unit: bool = True
) -> Path:
    """A BERT in the layout of sentence-transformers: modules.json, 1_Pooling, the limit of its length."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS.split(), *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz")]
    names += list("abcdefghijklmnopqrstuvwxyz")
    names = list(dict.fromkeys(names))
    tokenizer = Tokenizer(models.WordPiece({n: i for i, n in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    config = BertConfig(
        vocab_size=len(names),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * width,
        max_position_embeddings=64,
    )
    told = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    _write(folder, _drawn(lambda: BertModel(config), seed), tokenizer, told | {"model_max_length": 64})
    kind = "sentence_transformers.models"
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": f"{kind}.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{kind}.Pooling"},
    ]
    modules += [{"idx": 2, "name": "2", "path": "2_Normalize", "type": f"{kind}.Normalize"}] if unit else []
    modes = {"cls": "cls_token", "mean": "mean_tokens", "last": "lasttoken", "max": "max_tokens"}
    described = {
        "word_embedding_dimension": width,
        **{f"pooling_mode_{m}": m == modes[pooling] for m in modes.values()},
    }
    (folder / "1_Pooling").mkdir(exist_ok=True)
    for name, value in (
        ("modules.json", modules),
        ("1_Pooling/config.json", described),
        ("sentence_bert_config.json", {"max_seq_length": 48, "do_lower_case": False}),
    ):
        (folder / name).write_text(json.dumps(value, indent=2), encoding="utf-8")
    return folder


def _drawn(build: Any, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval()


def _write(folder: Path, model: Any, tokenizer: Any, names: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with quiet():
        model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder
