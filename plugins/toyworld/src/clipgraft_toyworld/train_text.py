"""The text tower: trained on complete captions against a network that sees the attributes, then frozen for good.

So the words for every detail, defect and motion have directions of their own, and whatever an image tower fails to say
later is the image tower's fault: the ceiling of the pair score is set here.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft_toyworld.captions import DAMAGED, DEFECTS, MOTIONS, PERFECT, STYLES, detailed_captions
from clipgraft_toyworld.schedule import Optimizer
from clipgraft_toyworld.towers import JOINT, SCALE, read
from clipgraft_toyworld.world import SIZES, Scene, generator, sample_scene

STEPS = 400
BATCH = 192
DETAIL_COUNTS = (0, 1, 1, 1, 1, 2, 2, 3, 3, 4, 6, 9)


class AttributeNetwork(nn.Module):
    """An image side that knows everything: attributes, defect (B,) in 0..4 and motion (B,) in 0..10, 0 for none."""

    def __init__(self, *, width: int = 256) -> None:
        super().__init__()
        inputs = sum(SIZES.values()) + len(DEFECTS) + 1 + len(MOTIONS) + 1
        self.layers = nn.Sequential(
            nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, JOINT)
        )

    def forward(self, scene: Scene, defect: Tensor, motion: Tensor) -> Tensor:
        """(B, D) of unit length."""
        hot = [F.one_hot(scene.value(name), size) for name, size in SIZES.items()]
        hot += [F.one_hot(defect, len(DEFECTS) + 1), F.one_hot(motion, len(MOTIONS) + 1)]
        return F.normalize(self.layers(torch.cat(hot, 1).float()), dim=-1)


def contrast(first: Tensor, second: Tensor, scale: float) -> Tensor:
    """Symmetric InfoNCE between unit embeddings (B, D)."""
    logits = scale * first @ second.T
    target = torch.arange(len(first))
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


def _with_events(text: str, defect: int, motion: int, rng: random.Random) -> str:
    """Now and then the caption also tells about style, damage or motion."""
    if " photo " in text and rng.random() < 0.2:
        text = text.replace(" photo ", f" {rng.choice(STYLES)} photo ", 1)
    if defect and rng.random() < 0.5:
        text = f"{text} with {DEFECTS[defect - 1]}" if rng.random() < 0.6 else _beside(text, rng.choice(DAMAGED), rng)
    elif not defect and rng.random() < 0.2:
        text = _beside(text, rng.choice(PERFECT), rng)
    if motion and rng.random() < 0.5:
        text = f"{text} {MOTIONS[motion - 1]}" if rng.random() < 0.5 else f"video of {text} {MOTIONS[motion - 1]}"
    return text


def _beside(text: str, condition: str, rng: random.Random) -> str:
    """Conditions of several words follow; a single word may also come right before the thing."""
    start, article, rest = text.rpartition("a ")
    if " " in condition or not article or (start and not start.endswith(" ")) or rng.random() < 0.4:
        return f"{text} {condition}"
    return f"{start}{article}{condition} {rest}"


def train_text_tower(clip: nn.Module, *, seed: int, steps: int = STEPS) -> AttributeNetwork:
    """Train the text side of `clip` in place; returns the attribute network, the oracle of the ceiling."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    draw = generator("train", stream="text", seed=seed, block=0)
    oracle = AttributeNetwork()
    optimizer = Optimizer([_TextSide(clip), oracle], steps=steps, lr=2e-3)
    for _ in range(steps):
        scene = sample_scene(BATCH, draw)
        if rng.random() < 0.4:  # one class per batch: only the details tell the captions apart
            first = {name: scene.value(name)[:1].expand(BATCH) for name in ("shape", "color")}
            scene = scene.with_values(**first)
        defect = torch.randint(len(DEFECTS) + 1, (BATCH,), generator=draw)
        motion = torch.randint(len(MOTIONS) + 1, (BATCH,), generator=draw)
        defect = torch.where(torch.rand(BATCH, generator=draw) < 0.6, 0, defect)
        motion = torch.where(torch.rand(BATCH, generator=draw) < 0.6, 0, motion)
        count = rng.choice(DETAIL_COUNTS)
        told = detailed_captions(scene, rng, counts=(count,), no_color=0.15, no_shape=0.1)
        told = [
            _with_events(text, d, m, rng) for text, d, m in zip(told, defect.tolist(), motion.tolist(), strict=True)
        ]
        loss = contrast(read(clip, told), oracle(scene, defect, motion), SCALE)
        optimizer.update(loss)
    return oracle.eval()


class _TextSide(nn.Module):
    """The text modules of a CLIP under one roof, so that an optimizer sees them alone."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.transformer = clip.transformer
        self.token_embedding = clip.token_embedding
        self.ln_final = clip.ln_final
        self.positional_embedding = clip.positional_embedding
        self.text_projection = clip.text_projection
