"""What a CLIP knows about the world: coarse zero-shot, pair score, probes, blind spots, and the ceiling."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft_toyworld.captions import TEMPLATES
from clipgraft_toyworld.pairs import Pairs, as_bytes, minimal_pairs
from clipgraft_toyworld.render import render
from clipgraft_toyworld.towers import IMAGE_SIZE, read_all, see_all
from clipgraft_toyworld.world import (
    BLOCK,
    DETAILS,
    SHAPES,
    Scene,
    Split,
    class_names,
    generator,
    join,
    sample_jitter,
    sample_scene,
)


@dataclass(frozen=True)
class Album:
    """n rendered scenes: `pixels` (n, 3, S, S) uint8, their scenes, `coverage` (n, 4, 4) of the patches by objects."""

    pixels: Tensor
    scene: Scene
    coverage: Tensor

    def __len__(self) -> int:
        return len(self.pixels)


@dataclass(frozen=True)
class Statements:
    """Unit text embeddings: `coarse` (64, D), `shapes` (8, D), `details` {name: (64, values, D)} of pair statements."""

    coarse: Tensor
    shapes: Tensor
    details: dict[str, Tensor]


def album(split: Split, *, blocks: int, seed: int = 0, size: int = IMAGE_SIZE) -> Album:
    """`blocks` blocks of BLOCK scenes: the same pictures as `toyworld/images` with these settings."""
    pixels, scenes, coverage = [], [], []
    for block in range(blocks):
        rng = generator(split, stream="images", seed=seed, block=block)
        scene, jitter = sample_scene(BLOCK, rng), sample_jitter(BLOCK, rng)
        picture = render(scene, jitter, size=size)
        pixels.append(as_bytes(picture.image))
        scenes.append(scene)
        coverage.append(F.adaptive_avg_pool2d(picture.instances.sum(1, keepdim=True), 4)[:, 0])
    return Album(pixels=torch.cat(pixels), scene=join(scenes), coverage=torch.cat(coverage))


def statements(clip: nn.Module) -> Statements:
    """The text side of every zero-shot decision; worth keeping while the text tower is frozen."""

    def prompts(names: list[str]) -> Tensor:
        return F.normalize(
            torch.stack([read_all(clip, [t.format(name) for name in names]) for t in TEMPLATES]).sum(0), dim=-1
        )

    names = class_names()
    details = {
        detail.name: read_all(clip, [f"a {name} {words}" for name in names for words in detail.phrases]).unflatten(
            0, (len(names), len(detail.phrases))
        )
        for detail in DETAILS
    }
    return Statements(coarse=prompts(names), shapes=prompts(list(SHAPES)), details=details)


def pair_outcomes(first: Tensor, second: Tensor, pairs: Pairs, table: Statements) -> Tensor:
    """(P,) bool: both pictures prefer their own statement, for unit image embeddings (P, D)."""
    outcome = torch.zeros(len(pairs.detail), dtype=torch.bool)
    for index, detail in enumerate(DETAILS):
        rows = pairs.detail == index
        choices = table.details[detail.name][pairs.first_scene.coarse()[rows]]  # (p, values, D)
        line = torch.arange(len(choices))
        gap = choices[line, pairs.first_scene.value(detail.name)[rows]]
        gap = gap - choices[line, pairs.second_scene.value(detail.name)[rows]]
        outcome[rows] = ((first[rows] * gap).sum(1) > 0) & ((second[rows] * gap).sum(1) < 0)
    return outcome


def ridge_probe(
    train: Tensor, test: Tensor, *, labels: dict[str, Tensor], truth: dict[str, Tensor], penalty: float = 1e-2
) -> dict[str, float]:
    """Accuracy of ridge classifiers from features (n, F) to several labels (n,), all solved at once."""
    mean, std = train.mean(0), train.std(0) + 1e-6

    def design(features: Tensor) -> Tensor:
        return F.pad((features - mean) / std, (0, 1), value=1.0).double()

    x = design(train)
    gram = x.T @ x + penalty * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    hot = [F.one_hot(values).double() for values in labels.values()]
    scores = (design(test) @ torch.linalg.solve(gram, x.T @ torch.cat(hot, 1))).split([h.shape[1] for h in hot], 1)
    return {
        name: (score.argmax(1) == truth[name]).double().mean().item()
        for name, score in zip(labels, scores, strict=True)
    }


@functools.cache
def _exam(split: Split, per_pattern: int, blocks: int) -> tuple[Album, Pairs]:
    return album(split, blocks=blocks, seed=1), minimal_pairs(split, per_pattern=per_pattern, size=IMAGE_SIZE)


@functools.cache
def _lesson() -> Album:
    """What probes are fitted to: 4,096 training pictures that no tower was trained on."""
    return album("train", blocks=16, seed=2)


def measure(
    clip: nn.Module, split: Split, *, per_pattern: int = 200, blocks: int = 12, probes: bool = True
) -> dict[str, float]:
    """Every number of the manifest on one split; `pair/x`, `detail/x`, `probe/x` and `tokens/x` are per detail."""
    exam, pairs = _exam(split, per_pattern, blocks)
    table = statements(clip)
    seen = see_all(clip, exam.pixels)
    first, second = see_all(clip, pairs.first).pooled, see_all(clip, pairs.second).pooled
    result = _scores(seen.pooled, first, second, exam, pairs, table)
    if probes:
        lesson = _lesson()
        known = see_all(clip, lesson.pixels)
        labels, truth = ({d.name: book.scene.value(d.name) for d in DETAILS} for book in (lesson, exam))
        pooled = ridge_probe(known.pooled, seen.pooled, labels=labels, truth=truth)
        tokens = ridge_probe(known.tokens.flatten(1), seen.tokens.flatten(1), labels=labels, truth=truth)
        for name in labels:
            result[f"probe/{name}"], result[f"tokens/{name}"] = pooled[name], tokens[name]
        result["probe"] = _mean(result, "probe/")
        result["tokens"] = _mean(result, "tokens/")
    return result


def measure_oracle(
    know: Callable[[Scene], Tensor], clip: nn.Module, split: Split, *, per_pattern: int = 200, blocks: int = 12
) -> dict[str, float]:
    """The same scores for an image side that maps scenes to unit embeddings (n, D): the text tower's own ceiling."""
    exam, pairs = _exam(split, per_pattern, blocks)
    return _scores(know(exam.scene), know(pairs.first_scene), know(pairs.second_scene), exam, pairs, statements(clip))


def _scores(
    seen: Tensor, first: Tensor, second: Tensor, exam: Album, pairs: Pairs, table: Statements
) -> dict[str, float]:
    coarse = exam.scene.coarse()
    guess = (seen @ table.coarse.T).argmax(1)
    outcome = pair_outcomes(first, second, pairs, table)
    cosine = (first * second).sum(1)
    result = {
        "zero_shot": _share(guess == coarse),
        "zero_shot_color": _share(guess // len(SHAPES) == exam.scene.color),
        "zero_shot_shape": _share((seen @ table.shapes.T).argmax(1) == exam.scene.shape),
        "pair": _share(outcome),
        "blind": _share(cosine > 0.95),
    }
    for index, detail in enumerate(DETAILS):
        rows = pairs.detail == index
        result[f"pair/{detail.name}"] = _share(outcome[rows])
        result[f"blind/{detail.name}"] = _share(cosine[rows] > 0.95)
        choices = table.details[detail.name][coarse]  # (n, values, D)
        best = torch.einsum("nd,nvd->nv", seen, choices).argmax(1)
        result[f"detail/{detail.name}"] = _share(best == exam.scene.value(detail.name))
    result["detail"] = _mean(result, "detail/")
    return result


def _share(hits: Tensor) -> float:
    return hits.double().mean().item()


def _mean(result: dict[str, float], prefix: str) -> float:
    values = [value for key, value in result.items() if key.startswith(prefix)]
    return sum(values) / len(values)
