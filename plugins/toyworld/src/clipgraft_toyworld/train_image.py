"""Image towers against a frozen text tower: a base that sees more than it says, and a teacher that says what it sees.

A base is trained in two phases. *Sight*: patch tokens must name every attribute, the pooled embedding the class only.
*Lazy*: the pooled embedding is trained contrastively with short captions, as CLIP is, and so learns little detail.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft_toyworld.captions import short_captions
from clipgraft_toyworld.measure import Album, Statements, statements
from clipgraft_toyworld.schedule import Optimizer
from clipgraft_toyworld.towers import SCALE, WIDTH, read_all, see
from clipgraft_toyworld.train_text import contrast
from clipgraft_toyworld.world import DETAILS, SIZES, Scene

SIGHT_STEPS, SIGHT_BATCH = 800, 64
LAZY_STEPS, LAZY_BATCH = 150, 128
TEACHER_STEPS, TEACHER_BATCH = 600, 64
ALIGN = 12.0
"""Weight of the distance to the caption in the lazy phase: what captions don't tell apart moves together, so that most

minimal pairs come closer than .95 as in real CLIP: .92 of them, zero-shot .79; without it .59 and .86 (base 0, tune).
"""


class TokenReader(nn.Module):
    """Names all attributes from the patch tokens that objects cover: the crutch that makes tokens worth reading."""

    def __init__(self) -> None:
        super().__init__()
        self.names = nn.Linear(WIDTH, sum(SIZES.values()))

    def forward(self, tokens: Tensor, coverage: Tensor) -> list[Tensor]:
        """Tokens (B, N, W), coverage (B, h, w) in [0, 1] -> logits (B, values) per attribute in the order of SIZES."""
        share = coverage.flatten(1) + 0.02
        mean = (tokens * share[..., None]).sum(1) / share.sum(1, keepdim=True)
        return list(self.names(mean).split(list(SIZES.values()), 1))


def attribute_loss(logits: list[Tensor], scene: Scene) -> Tensor:
    """Mean cross entropy over attributes, each relative to guessing."""
    losses = [
        F.cross_entropy(logit, scene.value(name)) / torch.tensor(float(size)).log()
        for logit, (name, size) in zip(logits, SIZES.items(), strict=True)
    ]
    return torch.stack(losses).mean()


def class_loss(pooled: Tensor, scene: Scene, table: Statements) -> Tensor:
    """Zero-shot cross entropy of class and of shape."""
    coarse = F.cross_entropy(SCALE * pooled @ table.coarse.T, scene.coarse())
    return coarse + 0.5 * F.cross_entropy(SCALE * pooled @ table.shapes.T, scene.shape)


def detail_loss(pooled: Tensor, scene: Scene, table: Statements) -> Tensor:
    """Zero-shot cross entropy of every detail among the statements of the scene's class."""
    coarse = scene.coarse()
    losses = [
        F.cross_entropy(
            SCALE * torch.einsum("bd,bvd->bv", pooled, table.details[detail.name][coarse]), scene.value(detail.name)
        )
        for detail in DETAILS
    ]
    return torch.stack(losses).mean()


def train_sight(clip: nn.Module, pool: Album, *, seed: int, steps: int = SIGHT_STEPS) -> TokenReader:
    """Phase 1, in place; returns the reader of the patch tokens."""
    torch.manual_seed(seed)
    reader, table = TokenReader(), statements(clip)
    optimizer = Optimizer([clip.visual, reader], steps=steps)  # type: ignore[list-item]
    for _ in range(steps):
        rows = torch.randint(len(pool), (SIGHT_BATCH,))
        scene, out = pool.scene[rows], see(clip, pool.pixels[rows])
        loss = attribute_loss(reader(out.tokens, pool.coverage[rows]), scene)
        optimizer.update(2 * loss + 0.2 * class_loss(out.pooled, scene, table))
    return reader


def train_lazy(clip: nn.Module, reader: TokenReader, pool: Album, *, seed: int, steps: int = LAZY_STEPS) -> None:
    """Phase 2, in place: short captions for the pooled embedding, the reader keeps the tokens as they are."""
    torch.manual_seed(seed + 1)
    rng = random.Random(seed)
    optimizer = Optimizer([clip.visual, reader], steps=steps, lr=5e-4, matrix_lr=5e-3)  # type: ignore[list-item]
    for _ in range(steps):
        rows = torch.randint(len(pool), (LAZY_BATCH,))
        scene, out = pool.scene[rows], see(clip, pool.pixels[rows])
        told = read_all(clip, short_captions(scene, rng))
        kept = attribute_loss(reader(out.tokens, pool.coverage[rows]), scene)
        near = (1 - (out.pooled * told).sum(1)).mean()
        optimizer.update(contrast(out.pooled, told, SCALE) + ALIGN * near + kept)


def train_teacher(clip: nn.Module, pool: Album, *, seed: int, steps: int = TEACHER_STEPS) -> None:
    """A tower that says every detail, in place: the measured ceiling of the frozen text tower."""
    torch.manual_seed(seed + 2)
    table = statements(clip)
    optimizer = Optimizer([clip.visual], steps=steps, matrix_lr=0.01)  # type: ignore[list-item]
    for _ in range(steps):
        rows = torch.randint(len(pool), (TEACHER_BATCH,))
        scene, out = pool.scene[rows], see(clip, pool.pixels[rows])
        optimizer.update(0.3 * class_loss(out.pooled, scene, table) + 3 * detail_loss(out.pooled, scene, table))
