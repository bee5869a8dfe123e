"""The grid of rows by poolings, cell by cell against open_clip's own model and against the definition."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clipgraft.checkpoint import write_export
from clipgraft.data.base import BadSample, Pair
from clipgraft.data.transforms import evaluation_transform
from clipgraft.encoders.base import Encoder
from clipgraft.encoders.openclip import build, open_clip_state
from clipgraft.errors import InputError
from clipgraft.evaluation import evaluate, records, statistics
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.evaluation.pairs import Pairs
from clipgraft.testing.tiny import tiny_clip
from clipgraft_evaluation import pairs_grid
from clipgraft_evaluation.pairs_grid import PairsGrid

WORDS = ("red", "blue", "green", "cat", "dog", "star", "circle")


@dataclass
class PairMemory:
    """Random pairs in three patterns; ``missing`` can't be read."""

    n: int = 30
    missing: tuple[int, ...] = ()
    name: str = "memory/pairs"
    patterns: tuple[str, ...] = ("a", "b", "c")

    @property
    def fingerprint(self) -> str:
        return f"{self.n}/{self.missing}"

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Pair:
        if index in self.missing:
            raise BadSample(f"p{index}", "missing file")
        rng = torch.Generator().manual_seed(index)
        one, two = torch.randint(256, (2, 3, 32, 32), generator=rng).to(torch.uint8)
        texts = (f"a {WORDS[index % 7]} {index}", f"a {WORDS[(index + 1) % 7]} {index + 1}")
        return Pair(f"p{index}", (one, two), texts, "aab"[index % 3])


def grid(encoder: Encoder, source: Any = None, *, batch_size: int = 256, **settings: Any) -> Any:
    return PairsGrid(**settings)(EncoderFeatures(encoder, batch_size=batch_size), source or PairMemory())


def plain(encoder: Encoder, source: Any = None) -> Any:
    return Pairs()(EncoderFeatures(encoder), source or PairMemory())


def quick(encoder: Encoder) -> Encoder:
    """The same weights in a model that open_clip builds with QuickGELU."""
    config = {**encoder.data.model_config, "quick_gelu": True}
    statistic = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    state = {name: value.clone() for name, value in open_clip_state(encoder).items()}
    return build(config, state, preprocess=statistic, tokenizer=encoder.tokenizer, origin=encoder.data.origin)


@torch.no_grad()
def by_definition(encoder: Encoder, official: str, *, repeats: int, seed: int) -> list[list[bool]]:
    """Whether each pair is right in each repeat, from open_clip's forward pass one image at a time."""
    tower, rng, found = encoder.image.tower, torch.Generator().manual_seed(seed), []
    source = PairMemory()
    for pair in (source[k] for k in range(len(source))):
        texts = F.normalize(encoder.text(encoder.tokenizer(pair.texts)).pooled, dim=-1)
        images: list[list[list[Tensor]]] = []
        for image in pair.images:
            pixels = encoder.preprocess.normalize(evaluation_transform(encoder.preprocess)(image)[None])
            x = tower.ln_post(tower.transformer(tower._embeds(pixels)))[0] @ tower.proj
            cls, patches = x[0], x[1:]
            if official != "openai":
                cls, patches = cls / cls.norm(), patches / patches.norm(dim=-1, keepdim=True)
            k = {"openai": 76, "dfn-378": 8, "metaclip": 0}[official]
            drawn = torch.randint(16, (repeats, 2, k), generator=rng)
            images.append([])
            for r in range(repeats):
                mixes = []
                for t in range(2):
                    chosen = [patches[int(j)] for j in drawn[r, t]] if k else list(patches)
                    mixed = cls + sum(chosen) / len(chosen)
                    mixes.append(mixed if official == "dfn-378" else mixed / mixed.norm())
                images[-1].append(mixes)
        found.append(
            [
                all(float(texts[t] @ images[t][r][t]) > float(texts[t] @ images[1 - t][r][t]) for t in range(2))
                for r in range(repeats)
            ]
        )
    return found


def mean_over_patterns(rights: list[float]) -> float:
    groups: dict[str, list[float]] = {}
    for k, right in enumerate(rights):
        groups.setdefault("aab"[k % 3], []).append(right)
    return sum(sum(own) / len(own) for own in groups.values()) / len(groups)


@pytest.mark.parametrize("kind", ["vit", "custom-text"])
def test_rows_are_the_model_with_each_activation(kind: Any) -> None:
    encoder = tiny_clip(kind=kind)
    with torch.no_grad():  # far enough from zero that the activations differ
        for name, weight in encoder.named_parameters():
            if name.endswith("c_fc.weight"):
                weight.mul_(12)
    other = quick(encoder)
    expected = {"gelu": plain(encoder), "quickgelu": plain(other)}
    assert [r["margins"] for r in expected["gelu"].samples] != [r["margins"] for r in expected["quickgelu"].samples]
    for own, measured in {"gelu": encoder, "quickgelu": other}.items():
        found = grid(measured, activations=True)
        assert found.metrics.keys() == {
            f"{row}/{column}"
            for row in expected
            for column in ("cls", "cls/total", "official", "official/sd", "official/total")
        }
        for row, one in expected.items():
            assert found.metrics[f"{row}/cls"] == pytest.approx(one.metrics["mean"])
            for mine, theirs in zip(found.samples, one.samples, strict=True):
                assert mine[f"{row}/cls/margin"] == pytest.approx(min(theirs["margins"]), abs=1e-6)
        assert [r["correct"] for r in found.samples] == [r["correct"] for r in expected[own].samples]
        assert [r["margin"] for r in found.samples] == [r[f"{own}/cls/margin"] for r in found.samples]


@pytest.mark.parametrize(("official", "repeats"), [("openai", 3), ("metaclip", 1), ("dfn-378", 2)])
def test_official_pooling_by_definition(official: Any, repeats: int) -> None:
    encoder = tiny_clip(seed=3)
    found = grid(encoder, official=official, repeats=repeats, seed=5)
    rights = by_definition(encoder, official, repeats=repeats, seed=5)
    shares = [sum(right) / repeats for right in rights]
    assert [row["own/official"] for row in found.samples] == pytest.approx(shares)
    most = sum(2 * sum(right) > repeats for right in rights)
    assert found.counts["own/official/total"] == (most, 30) and found.metrics["own/official/total"] == most / 30
    assert found.metrics["own/official"] == pytest.approx(mean_over_patterns(shares)) and 0 < sum(shares) < 30
    if repeats > 1:
        runs = torch.tensor([mean_over_patterns([float(r[k]) for r in rights]) for k in range(repeats)])
        assert found.metrics["own/official/sd"] == pytest.approx(float(runs.std()))
    else:
        assert "own/official/sd" not in found.metrics


def test_before_and_after(tmp_path: Path) -> None:
    base, encoder = tiny_clip(seed=1), tiny_clip(seed=2)
    write_export(base, tmp_path / "base")
    found = grid(encoder, before=str(tmp_path / "base"), official="metaclip")
    cells = {f"{row}/{column}" for row in ("before", "after") for column in ("cls", "official")}
    assert found.metrics.keys() == cells | {f"{cell}/total" for cell in cells} | {"cls/p", "official/p"}
    for row, one in {"before": base, "after": encoder}.items():
        assert found.metrics[f"{row}/cls"] == pytest.approx(plain(one).metrics["mean"])
        same = grid(one, official="metaclip")
        assert found.metrics[f"{row}/official"] == same.metrics["own/official"]
        assert found.counts[f"{row}/cls/total"] == plain(one).counts["total"] == same.counts["own/cls/total"]
    rights = [[row["correct"] for row in plain(one).samples] for one in (base, encoder)]
    lost, won = (sum(x > y for x, y in zip(*sides, strict=True)) for sides in (rights, rights[::-1]))
    assert found.metrics["cls/p"] == statistics.mcnemar(lost, won)
    assert [row["correct"] for row in found.samples] == [row["correct"] for row in plain(encoder).samples]


def test_axes_that_a_tower_does_not_have_are_left_out() -> None:
    encoder = tiny_clip(kind="siglip-timm")
    found = grid(encoder)
    expected = plain(encoder).metrics
    assert found.metrics == pytest.approx({"own/pooled": expected["mean"], "own/pooled/total": expected["total"]})
    assert [row["correct"] for row in found.samples] == [row["correct"] for row in plain(encoder).samples]
    average = tiny_clip()
    average.image.tower.pool_type = "avg"
    assert {name for name in grid(average, activations=True).metrics if name.count("/") == 1} == {
        "gelu/pooled",
        "quickgelu/pooled",
    }
    tanh = tiny_clip()
    tanh.text.tower.transformer.resblocks[0].mlp.gelu = torch.nn.GELU(approximate="tanh")  # type: ignore[union-attr]
    assert {name.rpartition("/total")[0] or name for name in grid(tanh, activations=True).metrics} == {
        "own/cls",
        "own/official",
        "own/official/sd",
    }


def test_the_encoder_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = tiny_clip()
    encoder.train()
    encoder.image.tower.transformer.resblocks[1].eval()

    def state() -> tuple[Any, ...]:
        modules = [(name, id(module), module.training) for name, module in encoder.named_modules()]
        return modules, torch.get_rng_state().tolist(), {k: v.clone() for k, v in encoder.state_dict().items()}

    def same(one: tuple[Any, ...], two: tuple[Any, ...]) -> bool:
        return one[:2] == two[:2] and all(torch.equal(one[2][k], two[2][k]) for k in one[2])

    before = state()
    grid(encoder, activations=True)
    assert same(before, state()) and all(p.grad is None for p in encoder.parameters())
    calls = []

    def broken(*_: Any) -> Tensor:
        calls.append(type(encoder.image.tower.transformer.resblocks[0].mlp.gelu).__name__)
        if len(calls) == 2:
            raise RuntimeError("half way")
        return torch.zeros(30, 1, 2)

    monkeypatch.setattr(pairs_grid, "_margins", broken)
    with pytest.raises(RuntimeError, match="half way"):
        grid(encoder, activations=True)
    monkeypatch.setattr(PairsGrid, "_mix", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        grid(encoder)
    assert same(before, state())


def test_batches_do_not_matter_and_seeds_do() -> None:
    encoder = tiny_clip(seed=4)
    one, *others = (grid(encoder, batch_size=size) for size in (1, 7, 256))
    for other in others:
        for mine, theirs in zip(one.samples, other.samples, strict=True):
            assert mine["own/official/margin"] == pytest.approx(theirs["own/official/margin"], abs=1e-6)
    moved = grid(encoder, seed=1)
    key = "own/official/margin"
    assert [row[key] for row in moved.samples] != [row[key] for row in one.samples]
    assert [row["own/cls/margin"] for row in moved.samples] == [row["own/cls/margin"] for row in others[1].samples]


def test_ties_are_wrong() -> None:
    class Same(PairMemory):
        def __getitem__(self, index: int) -> Pair:
            pair = super().__getitem__(index)
            return Pair(pair.id, (pair.images[0], pair.images[0]), pair.texts, pair.pattern)

    assert set(grid(tiny_clip(), Same(), official="metaclip").metrics.values()) == {0.0}


def test_statistics_are_the_metrics_and_come_back(tmp_path: Path) -> None:
    encoder = tiny_clip(seed=6)
    found = grid(encoder)
    assert found.statistics.keys() == found.metrics.keys()
    for name, statistic in found.statistics.items():
        assert statistics.value(statistic, found.samples) == pytest.approx(found.metrics[name])
    assert found.lower == {"own/official/sd"}
    low, high = statistics.intervals(found.statistics, found.samples)["own/official"]
    assert low <= found.metrics["own/official"] <= high and low < high
    records.save(tmp_path, {"grid": found})
    back = records.read(tmp_path)["grid"]
    values = {name: statistics.value(s, back.samples) for name, s in back.statistics.items()}
    assert values == pytest.approx({k: v for k, v in found.metrics.items() if not k.endswith("/sd")})


def test_what_can_not_be_read_is_counted() -> None:
    found = grid(tiny_clip(), PairMemory(missing=(0, 4)))
    assert found.metrics["skipped"] == 2 and len(found.samples) == 28
    with pytest.raises(InputError, match="memory/pairs has nothing that can be read: 2 of 2 samples"):
        grid(tiny_clip(), PairMemory(2, missing=(0, 1)))


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="holds single images; this needs minimal pairs, such as mmvp:DIR"):
        evaluate(tiny_clip(), ["pairs-grid"], default_data=f"folder:{tmp_path}")
    with pytest.raises(InputError, match="unknown model 'nowhere'"):
        grid(tiny_clip(), before="nowhere")


def test_a_base_without_text_tower_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = deepcopy(tiny_clip())
    bare.text = None
    monkeypatch.setattr(pairs_grid, "load", lambda _: bare)
    with pytest.raises(InputError, match="x has no text tower"):
        grid(tiny_clip(), before="x")
