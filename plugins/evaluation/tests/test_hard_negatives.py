"""The right caption among wrong ones, against scores computed one sample at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from clipgraft.data.base import BadSample, Sample
from clipgraft.data.transforms import evaluation_transform
from clipgraft.errors import InputError
from clipgraft.evaluation import evaluate, records, statistics
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.testing.tiny import tiny_clip
from clipgraft_evaluation import hard_negatives
from clipgraft_evaluation.hard_negatives import HardNegatives
from clipgraft_evaluation.layouts import CaptionRow, CaptionTests

WORDS = ("red", "blue", "green", "cat", "dog", "star", "circle", "left", "right", "two")


@dataclass
class Given:
    """Features from given tensors: images (n, D) and {text: (D,)}."""

    found: list[Sample]
    embedded: Tensor
    named: dict[str, Tensor]
    asked: list[int] = field(default_factory=list)

    def samples(self, source: Any) -> list[Sample]:
        return self.found

    def images(self, source: Any) -> Tensor:
        return self.embedded

    def texts(self, texts: Sequence[str]) -> Tensor:
        self.asked.append(len(texts))
        return torch.stack([self.named[text] for text in texts])


@dataclass
class Named:
    name: str = "given"
    fingerprint: str = "given"
    smallest: int = 1
    unfit: frozenset[str] = frozenset()


def given(n: int = 90, *, seed: int = 0, captions: int = 1) -> Given:
    """Samples of groups a, b and c in the shares 3 : 2 : 1 with one to four negatives."""
    rng = torch.Generator().manual_seed(seed)
    found, named = [], {}
    for k in range(n):
        right = tuple(f"{k} right {j}" for j in range(captions))
        wrong = tuple(f"{k} wrong {j}" for j in range(1 + k % 4))
        named |= {text: F.normalize(torch.randn(4, generator=rng), dim=-1) for text in (*right, *wrong)}
        found.append(Sample(f"s{k}", torch.empty(0), right, negatives=wrong, group="aaabbc"[k % 6]))
    return Given(found, F.normalize(torch.randn(n, 4, generator=rng), dim=-1), named)


def brute_force(features: Given) -> list[float]:
    """How much closer the image is to its worst caption than to the best wrong one."""
    margins = []
    for sample, image in zip(features.found, features.embedded.double(), strict=True):
        right = min(float(features.named[text].double() @ image) for text in sample.captions)
        margins.append(right - max(float(features.named[text].double() @ image) for text in sample.negatives))
    return margins


def picture_source(folder: Path, n: int = 12) -> CaptionTests:
    rows = []
    for k in range(n):
        Image.frombytes("RGB", (16, 16), bytes((k * 37 + i * 11) % 256 for i in range(768))).save(folder / f"{k}.png")
        caption = f"a {WORDS[k % 3]} {WORDS[3 + k % 4]} {WORDS[7 + k % 2]}"
        negatives = (f"a {WORDS[(k + 1) % 3]} {WORDS[3 + k % 4]}", f"{WORDS[9]} {caption}")[: 1 + k % 2]
        rows.append(CaptionRow(f"s{k}", f"{k}.png", caption, negatives, "ab"[k % 2]))
    return CaptionTests("tests", folder.resolve(), rows)


@pytest.mark.parametrize("captions", [1, 2])
@pytest.mark.parametrize("chunk", [7, 2**16])
def test_scores_equal_brute_force(captions: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hard_negatives, "CHUNK", chunk)
    features = given(captions=captions)
    found, margins = HardNegatives()(features, Named()), brute_force(features)
    assert [row["margin"] for row in found.samples] == pytest.approx(margins)
    right = [margin > 0 for margin in margins]
    assert [row["correct"] for row in found.samples] == right and 0 < sum(right) < 90
    assert found.counts["accuracy"] == (sum(right), 90) and found.counts["ties"] == (0, 90)
    shares = []
    for group, size in zip("abc", (45, 30, 15), strict=True):
        hits = sum(ok for ok, sample in zip(right, features.found, strict=True) if sample.group == group)
        assert found.counts[f"group/{group}"] == (hits, size)
        shares.append(hits / size)
    assert found.metrics["macro"] == pytest.approx(sum(shares) / 3) != found.metrics["accuracy"]
    assert len(features.asked) == 1  # no text is encoded twice
    assert found.statistics.keys() == found.metrics.keys()
    for name, statistic in found.statistics.items():
        assert statistics.value(statistic, found.samples) == pytest.approx(found.metrics[name]), name


def test_a_tie_is_wrong_and_counted() -> None:
    features = given()
    for sample in features.found[::2]:
        features.named[sample.negatives[-1]] = features.named[sample.captions[0]]
    found = HardNegatives()(features, Named())
    ties = [row["tie"] for row in found.samples]
    assert not any(row["correct"] for row in found.samples[::2])
    assert found.metrics["ties"] == sum(ties) / 90 and 0 < sum(ties) <= 45 and not any(ties[1::2])
    blind = Given(features.found, features.embedded, dict.fromkeys(features.named, torch.tensor([0.5] * 4)))
    found = HardNegatives()(blind, Named())
    assert found.metrics["accuracy"] == found.metrics["macro"] == 0 and found.metrics["ties"] == 1


def test_macro_leaves_out_what_the_benchmark_leaves_out() -> None:
    features = given()
    plain = HardNegatives()(features, Named()).metrics
    found = HardNegatives()(features, Named(unfit=frozenset("a")))
    assert found.metrics["macro"] == pytest.approx((plain["group/b"] + plain["group/c"]) / 2)
    assert found.metrics["group/a"] == plain["group/a"] and found.metrics["accuracy"] == plain["accuracy"]
    small = HardNegatives()(features, Named(smallest=16))
    assert small.metrics["macro"] == pytest.approx((plain["group/a"] + plain["group/b"]) / 2)
    assert "group/c" not in small.metrics
    assert HardNegatives(min_group=1)(features, Named(smallest=16)).metrics == plain
    assert "macro" not in HardNegatives()(features, Named(smallest=46)).metrics
    for case in (found, small):
        for name, statistic in case.statistics.items():
            assert statistics.value(statistic, case.samples) == pytest.approx(case.metrics[name]), name
    with pytest.raises(InputError, match="given has no group of 46 samples or more; set min_group lower"):
        HardNegatives(min_group=46)(features, Named())


def test_a_source_without_groups_has_no_macro() -> None:
    features = given(6)
    bare = [Sample(s.id, s.image, s.captions, negatives=s.negatives) for s in features.found]
    found = HardNegatives()(Given(bare, features.embedded, features.named), Named())
    assert found.metrics.keys() == {"accuracy", "ties"}


def test_a_tiny_clip_equals_brute_force_whatever_the_batch(tmp_path: Path) -> None:
    encoder, source = tiny_clip(), picture_source(tmp_path)
    margins = []
    with torch.no_grad():
        for sample in (source[k] for k in range(len(source))):
            pixels = evaluation_transform(encoder.preprocess)(sample.image)[None]
            texts = encoder.tokenizer([*sample.captions, *sample.negatives])
            image, text = encoder(encoder.preprocess.normalize(pixels), texts)
            own, *others = (text.unit() @ image.unit()[0]).tolist()
            margins.append(own - max(others))
    for size in (1, 5, 256):
        found = HardNegatives()(EncoderFeatures(encoder, batch_size=size), source)
        assert [row["margin"] for row in found.samples] == pytest.approx(margins, abs=1e-6)
        assert found.metrics["accuracy"] == sum(m > 0 for m in margins) / 12


def test_records_come_back(tmp_path: Path) -> None:
    features = given()
    found = HardNegatives()(features, Named(unfit=frozenset("b")))
    records.save(tmp_path, {"hard": found})
    back = records.read(tmp_path)["hard"]
    assert {k: statistics.value(s, back.samples) for k, s in back.statistics.items()} == pytest.approx(found.metrics)
    sizes = Counter(row["group"] for row in back.samples)
    assert sizes == {"a": 45, "b": 30, "c": 15} and all("counted" not in r for r in back.samples if r["group"] == "b")


def test_sources_without_negatives_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "table.csv").write_text("image,caption\na.png,a red cat\n", "utf-8")
    for ref in (f"folder:{tmp_path}", f"csv:{tmp_path / 'table.csv'}"):
        with pytest.raises(InputError, match=r"a\.png has no caption together with wrong ones; use aro:DIR") as error:
            evaluate(tiny_clip(), ["hard-negatives"], default_data=ref)
        assert "\n" not in str(error.value)


def test_fewer_ties_are_better(tmp_path: Path) -> None:
    row = CaptionRow("s", "a.png", "a red cat", ("a blue cat",), "g")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "add_att.json").write_text(
        f'{{"0": {{"filename": "a.png", "caption": "{row.caption}", "negative_caption": "{row.negatives[0]}"}}}}',
        "utf-8",
    )
    ref = f"sugarcrepe:{tmp_path}?part=add_att&images={tmp_path}"
    found = evaluate(tiny_clip(), ["hard-negatives?min_group=1"], default_data=ref)["evaluation/hard-negatives"]
    assert found.lower == {"ties"} and found.counts["group/add_att"][1] == 1


@pytest.mark.parametrize("name", ["a\0b.png", "x" * 5000 + ".png", "../a.png", ".", "a.txt"])
def test_odd_names_of_images_are_bad_samples(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "in" / "a.txt").write_text("no image", "utf-8")
    source = CaptionTests("tests", (tmp_path / "in").resolve(), [CaptionRow("s", name, "a", ("b",), "g")])
    with pytest.raises(BadSample, match=r"^s: ") as error:
        source[0]
    assert "\n" not in str(error.value)
