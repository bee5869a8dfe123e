"""The text teacher: a small bidirectional language model that knows words no image caption contains.

It is trained on text alone: the same scene told in plain words, in paraphrases and in rare words with negations must
land on the same spot. A text tower or a random network can't know that "crimson" is "red", so what a student learns
from it is knowledge and not context length. Saved as transformers saves a `BertModel`, with the world's tokenizer;
the sentence embedding is the mean of the last hidden states over real tokens.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft_toyworld.captions import detailed_captions, long_captions, reworded_captions
from clipgraft_toyworld.schedule import Optimizer
from clipgraft_toyworld.tokenizer import CONTEXT_LENGTH, encode, save_tokenizer, vocabulary
from clipgraft_toyworld.train_text import contrast
from clipgraft_toyworld.world import Scene, generator, sample_scene

STEPS, BATCH = 300, 128
TEACHER_WIDTH = 128


def build_text_teacher(seed: int) -> nn.Module:
    """An untrained two-layer `BertModel` over the world's vocabulary."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=len(vocabulary()),
        hidden_size=TEACHER_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=4 * TEACHER_WIDTH,
        max_position_embeddings=2 * CONTEXT_LENGTH,
        type_vocab_size=1,
        pad_token_id=0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = BertModel(config, add_pooling_layer=False)
    return model


def understand(teacher: nn.Module, texts: list[str]) -> Tensor:
    """(B, 128) unit sentence embeddings."""
    ids = encode(texts, trim=True)
    mask = (ids != 0).long()
    hidden = teacher(input_ids=ids, attention_mask=mask).last_hidden_state
    share = mask[..., None].float()
    return F.normalize((hidden * share).sum(1) / share.sum(1), dim=-1)


def _worded(scene: Scene, rng: random.Random) -> list[str]:
    kind = rng.random()
    if kind < 0.4:
        return reworded_captions(scene, rng)
    return long_captions(scene, rng) if kind < 0.8 else detailed_captions(scene, rng, counts=(4, 6), paraphrased=0.5)


def train_text_teacher(*, seed: int, steps: int = STEPS) -> nn.Module:
    """Contrast between two wordings of a scene."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    draw = generator("train", stream="text", seed=seed, block=1)
    teacher = build_text_teacher(seed)
    optimizer = Optimizer([teacher], steps=steps, inner="encoder.layer")
    for _ in range(steps):
        scene = sample_scene(BATCH, draw)
        if rng.random() < 0.3:
            first = {name: scene.value(name)[:1].expand(BATCH) for name in ("shape", "color")}
            scene = scene.with_values(**first)
        optimizer.update(
            contrast(understand(teacher, _worded(scene, rng)), understand(teacher, _worded(scene, rng)), 20.0)
        )
    return teacher.eval()


@torch.no_grad()
def measure_text_teacher(teacher: nn.Module, *, n: int = 500) -> dict[str, float]:
    """Test split: how often a reworded caption finds the plain one of its scene among n, and an untrained network's."""
    scene = sample_scene(n, generator("test", stream="text", seed=0, block=0))
    plain, rare = long_captions(scene, random.Random(1)), reworded_captions(scene, random.Random(2))

    def found(network: nn.Module) -> float:
        nearest = (understand(network, rare) @ understand(network, plain).T).argmax(1)
        return (nearest == torch.arange(n)).double().mean().item()

    return {"reworded_to_plain": found(teacher), "untrained": found(build_text_teacher(0).eval())}


def save_text_teacher(teacher: Any, folder: Path) -> None:
    """transformers' files in fp16, and the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    teacher.half().save_pretrained(folder)
    teacher.float()
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)
    save_tokenizer(folder)


def load_text_teacher(folder: Path) -> nn.Module:
    """In fp32, frozen."""
    from transformers import BertModel

    model: nn.Module = BertModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32)
    return model.eval().requires_grad_(False)
