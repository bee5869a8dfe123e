"""Evaluators equal brute force and open_clip, whatever the batch size and the order of rows; bad input is one line."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clipgraft.config.schema import EvaluatorNode
from clipgraft.data.base import BadSample, Pair, Sample
from clipgraft.errors import InputError
from clipgraft.evaluation import evaluate
from clipgraft.evaluation.base import Evaluation
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.evaluation.pairs import Pairs
from clipgraft.evaluation.probe import Probe
from clipgraft.evaluation.retrieval import Retrieval, _ranks
from clipgraft.evaluation.statistics import value
from clipgraft.evaluation.zero_shot import ZeroShot
from clipgraft.log import RunLog
from clipgraft.registry import Registry
from clipgraft.testing.tiny import tiny_clip
from clipgraft.types import FeatureRequest

COLORS = ("red", "green", "blue", "yellow", "purple", "orange")


def pixels(seed: int, side: int = 32) -> Tensor:
    return torch.randint(0, 256, (3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@dataclass
class Memory:
    """A source of given samples; a sample that is a string can't be read for that reason."""

    rows: Sequence[Sample | str]
    classes: Sequence[str] = ()
    templates: Sequence[str] = ()
    attributes: dict[str, Sequence[str]] = field(default_factory=dict)
    name: str = "memory"
    fingerprint: str = field(init=False)
    reads: int = 0

    def __post_init__(self) -> None:
        known = [
            row if isinstance(row, str) else (row.id, row.label, row.captions, row.attributes) for row in self.rows
        ]
        self.fingerprint = repr((self.classes, known))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        self.reads += 1
        row = self.rows[index]
        if isinstance(row, str):
            raise BadSample(f"bad{index}", row)
        return row


@dataclass
class PairMemory:
    """A source of given pairs."""

    rows: Sequence[Pair]
    patterns: Sequence[str]
    name: str = "pairs"
    fingerprint: str = "pairs"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Pair:
        return self.rows[index]


def labelled(n: int = 24, **changes: Any) -> Memory:
    rows = [Sample(f"s{i}", pixels(i), label=i % len(COLORS)) for i in range(n)]
    return Memory(**{"rows": rows, "classes": COLORS, "templates": ("a photo of a {}", "{}"), **changes})


def captioned(n: int = 12) -> Memory:
    words = ("circle", "square", "star")
    rows = []
    for i in range(n):
        captions = tuple(f"a {COLORS[i % 6]} {words[(i + k) % 3]} {i // 6}" for k in range(1 + i % 3))
        rows.append(Sample(f"s{i}", pixels(i), captions))
    return Memory(rows)


class Given:
    """Features as numbers: what an evaluator asks for is looked up."""

    def __init__(self, images: Tensor, texts: dict[str, Tensor], items: Sequence[Any], tokens: Any = None) -> None:
        self._images, self._texts, self._items, self._tokens = images, texts, list(items), tokens
        self.encoder = SimpleNamespace(image=SimpleNamespace(grid=(4, 4)))

    def images(self, source: Any) -> Tensor:
        return F.normalize(self._images, dim=-1)

    def tokens(self, source: Any) -> Tensor:
        return self._tokens

    def pair_images(self, source: Any) -> tuple[Tensor, Tensor]:
        return self.images(source)[0::2], self.images(source)[1::2]

    def samples(self, source: Any) -> list[Any]:
        return self._items

    pairs = samples

    def labels(self, source: Any) -> Tensor:
        return torch.tensor([item.label for item in self._items])

    def texts(self, texts: Sequence[str]) -> Tensor:
        return F.normalize(torch.stack([self._texts[text] for text in texts]), dim=-1)

    def classifier(self, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
        return self.texts(classes)


def one_line(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- features ----------------------------------------------------------------------------------------------------------


def test_images_are_the_tower_on_normalised_pixels_once() -> None:
    encoder, source = tiny_clip(), labelled(7)
    stacked = torch.stack([row.image for row in source.rows]).float() / 255
    with torch.no_grad():
        found = encoder.image((stacked - 0.5) / 0.5, FeatureRequest(tokens=True))
    features = EncoderFeatures(encoder, batch_size=3)
    assert torch.allclose(features.images(source), F.normalize(found.pooled, dim=-1), atol=1e-6)
    assert torch.allclose(features.tokens(source), found.tokens, atol=1e-5)
    assert [sample.id for sample in features.samples(source)] == [f"s{i}" for i in range(7)]


def test_a_source_is_read_once_by_all_who_ask() -> None:
    source = labelled(40)
    features = EncoderFeatures(tiny_clip(), batch_size=3, tokens=frozenset({source.fingerprint}))
    ZeroShot()(features, source)
    features.tokens(source)
    Probe(solver="ridge")(features, source)
    assert source.reads == 40
    without = EncoderFeatures(tiny_clip())
    without.images(source)
    without.tokens(source)
    assert source.reads == 40 + 80


def test_texts_are_trimmed_exactly_and_equal_texts_are_equal() -> None:
    encoder = tiny_clip()
    texts = ["a cat", "a photo of a small red circle and a large blue square", "a cat", "dog"]
    with torch.no_grad():
        full = encoder.text(encoder.tokenizer(texts)).unit()
    lengths = []
    encoder.text.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    found = EncoderFeatures(encoder, batch_size=2).texts(texts)
    assert torch.allclose(found, full, atol=1e-6)
    assert torch.equal(found[0], found[2])
    assert lengths == sorted(set(lengths)) and len(lengths) == 3 and lengths[-1] < encoder.text.context_length
    assert torch.allclose(EncoderFeatures(encoder, batch_size=1).texts(texts), full, atol=1e-6)


def test_text_towers_that_see_padding_are_not_trimmed() -> None:
    encoder = tiny_clip(kind="siglip-timm")
    texts = ["a cat", "a red circle"]
    with torch.no_grad():
        full = encoder.text(encoder.tokenizer(texts)).unit()
    assert torch.allclose(EncoderFeatures(encoder).texts(texts), full, atol=1e-6)


@pytest.mark.parametrize("kind", ["vit", "custom-text"])
def test_zero_shot_equals_open_clip(kind: Any) -> None:
    open_clip = pytest.importorskip("open_clip")
    encoder, source = tiny_clip(kind=kind), labelled()

    class Model(torch.nn.Module):
        def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
            found = encoder.text(text)
            return found.unit() if normalize else found.pooled

    weights = open_clip.build_zero_shot_classifier(Model(), encoder.tokenizer, source.classes, source.templates)
    images = torch.stack([row.image for row in source.rows]).float() / 255
    labels = torch.tensor([row.label for row in source.rows])
    with torch.no_grad():
        logits = 100 * encoder.image(encoder.preprocess.normalize(images)).unit() @ weights
    features = EncoderFeatures(encoder, batch_size=5)
    assert torch.allclose(features.classifier(source.classes, source.templates), weights.T, atol=1e-6)
    found = ZeroShot()(features, source)
    expected = [float((logits.topk(k).indices == labels[:, None]).any(1).float().mean()) for k in (1, 5)]
    assert [found.metrics["top1"], found.metrics["top5"]] == pytest.approx(expected)
    assert [row["prediction"] for row in found.samples] == logits.argmax(1).tolist()


def test_classifiers_are_kept_by_content() -> None:
    kept: dict[str, Tensor] = {}
    first, calls = tiny_clip(0), []

    def classifier(encoder: Any, classes: Sequence[str] = COLORS, templates: Sequence[str] = ("a {}",)) -> Tensor:
        handle = encoder.text.register_forward_pre_hook(lambda module, args: calls.append(1))
        found = EncoderFeatures(encoder, classifiers=kept).classifier(classes, templates)
        handle.remove()
        return found

    a = classifier(first)
    assert torch.equal(classifier(tiny_clip(0)), a) and len(calls) == 1  # equal weights, another object
    assert not torch.equal(classifier(tiny_clip(1)), a) and len(calls) == 2
    assert not torch.equal(classifier(first, templates=("the {}",)), a) and len(calls) == 3
    assert classifier(first, classes=COLORS[:3]).shape == (3, 16) and len(calls) == 4
    with torch.no_grad():
        next(iter(first.text.parameters())).add_(0.1)
    assert not torch.equal(classifier(first), a) and len(calls) == 5
    assert len(kept) == 5


def test_modes_gradients_and_random_state_are_as_before() -> None:
    encoder = tiny_clip().train()
    encoder.image.eval()
    modes = [module.training for module in encoder.modules()]
    before = torch.get_rng_state()
    seen = []
    encoder.text.register_forward_pre_hook(
        lambda module, args: seen.append((module.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
    )
    features, source = EncoderFeatures(encoder), labelled(6)
    found = ZeroShot()(features, source)
    assert seen and set(seen) == {(False, False, False)}
    assert not features.images(source).requires_grad and found.metrics
    assert [module.training for module in encoder.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in encoder.parameters())


def test_unreadable_samples_are_skipped_and_said() -> None:
    source = labelled(8)
    rows = [*source.rows[:3], "missing file", *source.rows[3:], "truncated"]
    source, out = replace(source, rows=rows), io.StringIO()
    features = EncoderFeatures(tiny_clip(), batch_size=4, log=RunLog(stream=out))
    assert features.images(source).shape == (8, 16) and features.skipped(source) == 2
    assert [sample.id for sample in features.samples(source)] == [f"s{i}" for i in range(8)]
    assert "memory: 2 of 10 samples can't be read: bad3: missing file; bad9: truncated" in out.getvalue()
    empty = replace(source, rows=["missing file"] * 3)
    assert "nothing that can be read: 3 of 3" in one_line(lambda: features.images(empty))


def test_16_bit_encoders_give_fp32_features() -> None:
    source = labelled(4)
    found = EncoderFeatures(tiny_clip().bfloat16()).images(source)
    assert found.dtype == torch.float32
    assert torch.allclose(found, EncoderFeatures(tiny_clip()).images(source), atol=0.05)


# -- zero-shot ---------------------------------------------------------------------------------------------------------


def test_zero_shot_by_hand() -> None:
    """Five classes on the axes; images lean towards a known order of them."""
    axes = torch.eye(5)
    leanings = [[5, 4, 3, 2, 1], [1, 5, 4, 3, 2], [5, 4, 3, 2, 1], [2, 1, 5, 4, 3], [1, 2, 3, 4, 5]]
    labels = [0, 1, 4, 2, 3]  # right, right, last of five, right, second
    items = [Sample(f"s{i}", pixels(0), label=label) for i, label in enumerate(labels)]
    names = [f"c{k}" for k in range(5)]
    source = Memory(items, classes=names)
    features: Any = Given(torch.tensor(leanings).float(), dict(zip(names, axes, strict=True)), items)
    found = ZeroShot()(features, source)
    assert found.metrics == {"top1": 0.6, "top5": 1.0, "mean_per_class": pytest.approx(3 / 5)}
    assert found.counts == {"top1": (3, 5), "top5": (5, 5)}
    assert found.samples[2] == {"id": "s2", "label": 4, "prediction": 0, "top1": False, "top5": True}


def test_mean_per_class_weighs_classes_and_not_samples() -> None:
    items = [Sample(f"s{i}", pixels(0), label=label) for i, label in enumerate([0, 0, 0, 1])]
    source = Memory(items, classes=("a", "b", "never"))
    texts = dict(zip(source.classes, torch.eye(3), strict=True))
    features: Any = Given(torch.tensor([[1.0, 0, 0]] * 4), texts, items)
    found = ZeroShot()(features, source)
    assert found.metrics == {"top1": 0.75, "mean_per_class": 0.5}


def test_ties_and_nan_are_wrong() -> None:
    items = [Sample(f"s{i}", pixels(0), label=i % 2) for i in range(4)]
    source = Memory(items, classes=("a", "b"))
    texts = {"a": torch.tensor([1.0, 0]), "b": torch.tensor([0.0, 1])}
    for images in (torch.ones(4, 2), torch.full((4, 2), torch.nan)):
        features: Any = Given(images, texts, items)
        assert ZeroShot()(features, source).metrics["top1"] == 0


def test_labels_that_do_not_fit_are_one_line() -> None:
    features = EncoderFeatures(tiny_clip())

    def line(source: Memory) -> str:
        return one_line(lambda: ZeroShot()(features, source))

    assert "has 1 classes where two or more are needed" in line(labelled(4, classes=("red",)))
    assert "has 0 classes" in line(labelled(4, classes=()))
    assert "s5 has label 5, outside its 5 classes" in line(labelled(6, classes=COLORS[:5]))
    rows = [*labelled(3).rows, Sample("bare", pixels(0))]
    assert "bare has no label" in line(labelled(rows=rows))
    assert "must hold {} once" in line(labelled(4, templates=("nothing",)))


# -- retrieval ---------------------------------------------------------------------------------------------------------


def brute_force(images: Tensor, texts: Tensor, owner: Sequence[int]) -> tuple[list[int], list[int]]:
    scores = (images @ texts.T).tolist()
    to_text, to_image = [], []
    for i in range(len(images)):
        best = max(s for s, o in zip(scores[i], owner, strict=True) if o == i)
        to_text.append(sum(s >= best for s, o in zip(scores[i], owner, strict=True) if o != i))
    for j, o in enumerate(owner):
        to_image.append(sum(scores[i][j] >= scores[o][j] for i in range(len(images)) if i != o))
    return to_text, to_image


@pytest.mark.parametrize("chunk", [1, 40, 2**24])
def test_retrieval_equals_brute_force(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipgraft.evaluation.retrieval.CHUNK", chunk)
    encoder, source = tiny_clip(), captioned()
    captions = [c for row in source.rows for c in row.captions]
    owner = [i for i, row in enumerate(source.rows) for _ in row.captions]
    features = EncoderFeatures(encoder)
    to_text, to_image = brute_force(features.images(source).double(), features.texts(captions).double(), owner)
    found = Retrieval(ks=(1, 3, 12))(features, source)
    assert [row["caption_rank"] for row in found.samples] == to_text
    assert [rank for row in found.samples for rank in row["image_ranks"]] == to_image
    for k in (1, 3, 12):
        assert found.metrics[f"image_to_text_r{k}"] == pytest.approx(sum(r < k for r in to_text) / len(to_text))
        assert found.metrics[f"text_to_image_r{k}"] == pytest.approx(sum(r < k for r in to_image) / len(to_image))
    assert found.metrics["text_to_image_r12"] == 1
    assert found.counts["text_to_image_r1"][1] == len(captions)
    assert [row["image_to_text_r1"] for row in found.samples] == [rank == 0 for rank in to_text]


def test_shared_captions_and_constant_models_count_against() -> None:
    rows = [Sample(f"s{i}", pixels(i), ("the same",)) for i in range(23)]
    found = Retrieval(ks=(1, 22))(EncoderFeatures(tiny_clip()), Memory(rows))
    assert [row["caption_rank"] for row in found.samples] == [22] * 23  # 22 others are exactly as good
    assert found.metrics["image_to_text_r1"] == found.metrics["image_to_text_r22"] == 0
    texts = {c: torch.randn(3) for row in captioned(4).rows for c in row.captions}
    for images in (torch.zeros(4, 3), torch.full((4, 3), torch.nan)):
        features: Any = Given(images, texts, captioned(4).rows)
        assert Retrieval(ks=(1,))(features, captioned(4)).metrics == {"image_to_text_r1": 0, "text_to_image_r1": 0}


def test_equal_candidates_tie_to_the_last_bit() -> None:
    """A matrix product may round equal columns differently, which would make ranks among equals a lottery."""
    rng = torch.Generator().manual_seed(0)
    queries, text = F.normalize(torch.randn(50, 64, generator=rng), dim=-1), F.normalize(torch.ones(1, 64), dim=-1)
    for count in (5, 6, 7, 9):
        several = _ranks(queries, text, [[0]] * 50, each=torch.tensor([count]))
        alike = _ranks(queries, text.expand(count, -1), [[i % count] for i in range(50)])
        assert several.tolist() == alike.tolist() == [count - 1] * 50


def test_ranks_count_every_candidate_that_a_row_stands_for() -> None:
    """Two captions of an image may be equal, and equal to captions of others."""
    rows = [Sample("a", pixels(0), ("x", "x", "y")), Sample("b", pixels(1), ("x", "z")), Sample("c", pixels(2), ("y",))]
    texts = {"x": torch.tensor([1.0, 0]), "y": torch.tensor([0.0, 1]), "z": torch.tensor([-1.0, 0])}
    images = F.normalize(torch.tensor([[3.0, 1], [1, -1], [-1, 1]]), dim=-1)
    features: Any = Given(images, texts, rows)
    captions, owner = [c for row in rows for c in row.captions], [i for i, row in enumerate(rows) for _ in row.captions]
    to_text, to_image = brute_force(images, torch.stack([texts[c] for c in captions]), owner)
    found = Retrieval(ks=(1,))(features, Memory(rows))
    assert [row["caption_rank"] for row in found.samples] == to_text == [1, 2, 2]
    assert [rank for row in found.samples for rank in row["image_ranks"]] == to_image


def test_any_hit_counts_for_images_with_several_captions() -> None:
    items = [Sample("a", pixels(0), ("good", "awful")), Sample("b", pixels(0), ("other",))]
    texts = {"good": torch.tensor([1.0, 0]), "awful": torch.tensor([-1.0, 0.1]), "other": torch.tensor([0.0, 1])}
    features: Any = Given(torch.eye(2), texts, items)
    found = Retrieval(ks=(1,))(features, Memory(items))
    assert found.metrics == {"image_to_text_r1": 1.0, "text_to_image_r1": pytest.approx(2 / 3)}


def test_retrieval_refuses_what_it_cannot_rank() -> None:
    features = EncoderFeatures(tiny_clip())
    assert "recall at 10 among 5 images" in one_line(lambda: Retrieval(ks=(1, 10))(features, captioned(5)))
    assert "recall at 1 among 1 images" in one_line(lambda: Retrieval()(features, captioned(1)))
    assert set(Retrieval()(features, captioned(5)).counts) == {
        f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5)
    }
    assert "recall at 1 among" in one_line(lambda: Retrieval(ks=(0, 1))(features, captioned(5)))
    bare = Memory([*captioned(3).rows, Sample("bare", pixels(0))])
    assert "bare has no caption" in one_line(lambda: Retrieval(ks=(1,))(features, bare))


# -- minimal pairs -----------------------------------------------------------------------------------------------------


PAIR_IMAGES = {
    "right": [[1, 0, 0], [0, 1, 0]],
    "narrowly right": [[1, 0, 0], [0.8, 0.6, 0]],
    "wrong first": [[0.6, 0.1, 0.8], [0.8, 0.6, 0]],
    "wrong second": [[0.8, 0.6, 0], [0.6, 0.3, 0.74]],
    "both wrong": [[0, 1, 0], [1, 0, 0]],
    "tie": [[1, 1, 1], [1, 1, 1]],
    "tie of the second": [[0.8, 0.6, 0], [0, 0.6, 0.8]],
}


def pairs_by_hand() -> tuple[Any, PairMemory]:
    texts = {"x": torch.tensor([1.0, 0, 0]), "y": torch.tensor([0.0, 1, 0])}
    images = torch.tensor([image for two in PAIR_IMAGES.values() for image in two]).float()
    rows = [Pair(n, (pixels(0), pixels(1)), ("x", "y"), "tied" if "tie" in n else "plain") for n in PAIR_IMAGES]
    return Given(images, texts, rows), PairMemory(rows, ("tied", "plain", "never"))


def official(images: Tensor, texts: Tensor, scale: float = 100.0) -> list[bool]:
    """MMVP's script: (n, 2, D) and (n, 2, D); image 1 is chosen iff its probability exceeds one half."""
    right = []
    for image, text in zip(images, texts, strict=True):
        chosen = (scale * text @ image.T).softmax(-1)[:, 0] > 0.5
        right.append(bool(chosen[0]) and not bool(chosen[1]))
    return right


def test_pairs_by_hand() -> None:
    features, source = pairs_by_hand()
    found = Pairs()(features, source)
    assert [row["id"] for row in found.samples if row["correct"]] == ["right", "narrowly right"]
    assert found.counts == {"total": (2, 7), "tied": (0, 2), "plain": (2, 5)}
    assert found.metrics == {"mean": pytest.approx(0.2), "total": pytest.approx(2 / 7), "tied": 0.0, "plain": 0.4}
    assert found.samples[0] == {"id": "right", "pattern": "plain", "correct": True, "margins": [1.0, 1.0]}
    json.dumps(found.samples)


def random_pairs(n: int = 30) -> PairMemory:
    rows = []
    for i in range(n):
        texts = (f"a {COLORS[i % 6]} circle {i}", f"a {COLORS[(i + 1) % 6]} star {i}")
        rows.append(Pair(f"p{i}", (pixels(2 * i), pixels(2 * i + 1)), texts, ("state", "color", "text")[i % 3]))
    return PairMemory(rows, ("color", "state", "text"))


def test_pairs_equal_the_official_rule_and_ignore_the_logit_scale() -> None:
    features, source = EncoderFeatures(tiny_clip()), random_pairs()
    images = torch.stack(features.pair_images(source), 1)
    texts = features.texts([text for row in source.rows for text in row.texts]).view(30, 2, -1)
    found = Pairs()(features, source)
    right = [row["correct"] for row in found.samples]
    assert 0 < sum(right) < 30
    assert right == official(images, texts) == official(images, texts, scale=1000.0)
    assert found.counts["color"] == (sum(right[1::3]), 10)
    loud = tiny_clip()
    with torch.no_grad():
        loud.logit_scale.add_(3.0)
    assert Pairs()(EncoderFeatures(loud), source) == found


def test_identical_images_can_not_be_told_apart() -> None:
    rows = [replace(row, images=(row.images[0], row.images[0])) for row in random_pairs(6).rows]
    assert Pairs()(EncoderFeatures(tiny_clip()), PairMemory(rows, ("state",))).metrics["total"] == 0


def test_evaluators_want_the_right_kind_of_data() -> None:
    features: Any = EncoderFeatures(tiny_clip())
    assert "memory holds single images; this needs minimal pairs" in one_line(lambda: Pairs()(features, labelled()))
    for evaluator in (Retrieval(), Probe()):
        single: Any = evaluator
        assert "pairs holds minimal pairs" in one_line(lambda call=single: call(features, random_pairs(3)))


# -- linear probe ------------------------------------------------------------------------------------------------------


def probed(n: int = 120) -> Memory:
    """Colour is written on the pixels, parity is not."""
    rows = []
    for i in range(n):
        image = pixels(i) // 4
        image[i % 3] += 150
        attributes = {"hue": i % 3, "parity": int(pixels(10_000 + i)[0, 0, 0]) % 2}
        rows.append(Sample(f"s{i}", image, attributes=attributes, label=i % 3))
    names = {"hue": ("red", "green", "blue"), "parity": ("even", "odd")}
    return Memory(rows, classes=("red", "green", "blue"), attributes=names)


@pytest.mark.parametrize("on", ["pooled", "tokens"])
@pytest.mark.parametrize("solver", ["lbfgs", "ridge"])
def test_probe_reads_what_is_there(on: Any, solver: Any) -> None:
    found = Probe(on=on, solver=solver)(EncoderFeatures(tiny_clip()), probed())
    assert found.metrics["hue"] > 0.9 and found.metrics["parity"] < 0.75
    assert found.metrics["mean"] == pytest.approx((found.metrics["hue"] + found.metrics["parity"]) / 2)
    tested = found.counts["hue"][1]
    assert 40 < tested < 80 and len(found.samples) == tested
    assert set(found.samples[0]) == {"id", "hue", "parity", "mean"}


def test_probe_of_labels_and_on_given_training_data(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = replace(probed(60), attributes={})
    other = replace(probed(90), attributes={})
    features = EncoderFeatures(tiny_clip())
    found = Probe(solver="ridge")(features, plain)
    assert set(found.metrics) == {"mean", "label"} and set(found.samples[0]) == {"id", "label", "mean"}
    monkeypatch.setattr("clipgraft.data.open_source", lambda ref: {"mem:other": other, "mem:more": probed()}[ref])
    found = Probe(solver="ridge", train="mem:other")(features, plain)
    assert found.counts["label"][1] == 60 and found.metrics["label"] > 0.9
    mismatch = one_line(lambda: Probe(train="mem:more")(features, plain))
    assert "train: mem:more doesn't have the labels of memory" in mismatch


def test_probe_of_tokens_averages_large_grids() -> None:
    tokens = torch.arange(2 * 64 * 3).reshape(2, 64, 3).float()
    given: Any = Given(torch.ones(2, 3), {}, [], tokens=tokens)
    given.encoder.image.grid = (8, 8)
    flat = Probe(on="tokens")._features(given, labelled(2))
    by_hand = tokens.view(2, 4, 2, 4, 2, 3).mean((2, 4)).permute(0, 3, 1, 2).flatten(1)
    assert flat.shape == (2, 48) and torch.allclose(flat, by_hand)


def test_probe_says_what_is_missing() -> None:
    features = EncoderFeatures(tiny_clip())
    rows = [*probed(60).rows, Sample("bare", pixels(0), attributes={"hue": 1})]
    line = one_line(lambda: Probe()(features, replace(probed(), rows=rows)))
    assert "bare has no attribute parity" in line
    same = [replace(row, attributes={"hue": 0, "parity": 0}) for row in probed(40).rows]
    assert "two classes" in one_line(lambda: Probe()(features, replace(probed(), rows=same)))


# -- all of them -------------------------------------------------------------------------------------------------------

CASES: list[tuple[Any, Callable[[], Any]]] = [
    (ZeroShot(), labelled),
    (Retrieval(ks=(1, 5)), captioned),
    (Pairs(), random_pairs),
    (Probe(), probed),
    (Probe(on="tokens", solver="ridge"), probed),
]


@pytest.mark.parametrize(("evaluator", "source"), CASES, ids=["zero-shot", "retrieval", "pairs", "probe", "tokens"])
def test_neither_batch_size_nor_row_order_matters(evaluator: Any, source: Callable[[], Any]) -> None:
    encoder = tiny_clip()
    whole = evaluator(EncoderFeatures(encoder), source())
    small = evaluator(EncoderFeatures(encoder, batch_size=7), source())
    shuffled = source()
    order = torch.randperm(len(shuffled), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = replace(shuffled, rows=[shuffled.rows[i] for i in order])
    turned = evaluator(EncoderFeatures(encoder), shuffled)
    assert small.metrics == whole.metrics == turned.metrics
    assert small.counts == whole.counts == turned.counts
    assert whole.statistics.keys() == whole.metrics.keys()
    for name, statistic in whole.statistics.items():
        assert value(statistic, whole.samples) == pytest.approx(whole.metrics[name], abs=1e-12)
    key = next(k for k in ("top1", "image_to_text_r1", "correct", "hue") if k in whole.samples[0])
    right = [{row["id"]: row[key] for row in e.samples} for e in (whole, small, turned)]
    assert right[0] == right[1] == right[2]
    ids = [row.id for row in shuffled.rows]
    assert [row["id"] for row in turned.samples] == [i for i in ids if i in right[0]]


# -- evaluate ----------------------------------------------------------------------------------------------------------


@dataclass
class FakeRegistry:
    """Evaluators and data by name."""

    data: dict[str, Any]

    def get(self, kind: str, name: str) -> Any:
        return SimpleNamespace(name=f"core/{name.removeprefix('core/')}")

    def build(self, kind: str, name: str, settings: dict[str, Any]) -> Any:
        if kind == "dataset":
            return self.data[name]
        kinds = {"zero-shot": ZeroShot, "retrieval": Retrieval, "pairs": Pairs, "linear-probe": Probe}
        return kinds[name.removeprefix("core/")](**settings)


def run(nodes: Sequence[Any], **options: Any) -> dict[str, Evaluation]:
    registry: Any = FakeRegistry({"p/labelled": labelled(), "p/pairs": random_pairs(), "p/probed": probed()})
    return evaluate(tiny_clip(), nodes, registry=registry, **options)


def test_evaluate_names_results_in_full() -> None:
    found = run(["zero-shot", "core/pairs@p/pairs"], default_data="p/labelled", batch_size=8)
    assert list(found) == ["core/zero-shot", "core/pairs"]
    alone = ZeroShot()(EncoderFeatures(tiny_clip()), labelled())
    assert replace(found["core/zero-shot"], intervals={}) == alone
    assert replace(found["core/pairs"], intervals={}) == Pairs()(EncoderFeatures(tiny_clip()), random_pairs())
    spans = found["core/zero-shot"].intervals
    assert spans.keys() == alone.metrics.keys()
    assert all(low <= alone.metrics[name] <= high for name, (low, high) in spans.items())


def test_intervals_can_be_left_out() -> None:
    settings: Any = {"default_data": "p/labelled", "batch_size": 8}
    with_them, without = run(["zero-shot"], **settings), run(["zero-shot"], spread=False, **settings)
    assert with_them["core/zero-shot"].intervals and not without["core/zero-shot"].intervals
    assert replace(with_them["core/zero-shot"], intervals={}) == without["core/zero-shot"]


def test_evaluate_tells_repeated_evaluators_apart() -> None:
    def probe(data: str | None = None, **settings: Any) -> EvaluatorNode:
        return EvaluatorNode(use="linear-probe", data=data, solver="ridge", **settings)

    found = run([probe("p/labelled"), probe("p/probed"), "zero-shot"], default_data="p/labelled")
    assert list(found) == ["core/linear-probe@p/labelled", "core/linear-probe@p/probed", "core/zero-shot"]
    found = run([probe(on="pooled"), probe(on="tokens"), probe("p/labelled")], default_data="p/probed")
    assert list(found) == [
        "core/linear-probe[solver=ridge,on=pooled]@p/probed",
        "core/linear-probe[solver=ridge,on=tokens]@p/probed",
        "core/linear-probe@p/labelled",
    ]
    assert "listed twice" in one_line(lambda: run(["zero-shot", "zero-shot"], default_data="p/labelled"))


def test_evaluate_reads_each_source_once_with_tokens_if_anyone_wants_them() -> None:
    source = probed()
    registry: Any = FakeRegistry({"p/probed": source})
    nodes = ["zero-shot", EvaluatorNode(use="linear-probe", on="tokens", solver="ridge")]
    evaluate(tiny_clip(), nodes, registry=registry, default_data="p/probed")
    assert source.reads == 120


def test_evaluate_counts_what_it_skips_and_wants_data() -> None:
    rows = ["missing file", *labelled().rows]
    registry: Any = FakeRegistry({"p/labelled": labelled(rows=rows)})
    found = evaluate(tiny_clip(), ["zero-shot@p/labelled"], registry=registry)
    assert found["core/zero-shot"].metrics["skipped"] == 1
    assert "skipped" not in run(["zero-shot"], default_data="p/labelled")["core/zero-shot"].metrics
    assert "core/zero-shot has no data to measure on; give --data" in one_line(lambda: run(["zero-shot"]))


def test_files_are_measured_through_the_registry(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    skimage, sklearn = pytest.importorskip("skimage"), pytest.importorskip("sklearn")
    data, images = Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets" / "images"
    files = {"cat": data / "chelsea.png", "building": images / "china.jpg", "flower": images / "flower.jpg"}
    rows = ["image,caption"]
    for name, file in files.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        shutil.copy(file, tmp_path / "photos" / name)
        rows += [f"photos/{name}/{file.name},a photo of a {name}", f"photos/{name}/{file.name},one {name}"]
    shutil.copy(data / "multipage_rgb.tif", tmp_path / "photos" / "cat")  # real, and not readable by Pillow
    (tmp_path / "pairs.csv").write_text("\n".join([*rows, "photos/gone.jpg,a dog"]))
    nodes = [f"zero-shot@folder:{tmp_path / 'photos'}", f"retrieval@csv:{tmp_path / 'pairs.csv'}"]
    found = evaluate(tiny_clip(), nodes, registry=Registry.discover(allow=()))
    assert found["core/zero-shot"].counts["top1"][1] == 3 and found["core/zero-shot"].metrics["skipped"] == 1
    assert {row["id"] for row in found["core/zero-shot"].samples} == {f"{n}/{f.name}" for n, f in files.items()}
    assert found["core/retrieval"].counts["text_to_image_r1"][1] == 6
    assert "photos/gone.jpg: missing file; skipped" in caplog.text
    json.dumps([dict(row) for evaluation in found.values() for row in evaluation.samples])
