"""CLIPN's two rules, what they are measured by (facts N5 and N9), and the evaluator ``anomaly/clipn-ood``."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from clipgraft.data.base import Sample
from clipgraft.encoders.base import Origin
from clipgraft.errors import InputError
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.evaluation.statistics import value
from clipgraft.registry import Registry, use
from clipgraft.testing.tiny import tiny_clip
from clipgraft_anomaly.clipn import unknown_classes
from clipgraft_anomaly.clipn.branch import NoBranch, NoConfig
from clipgraft_anomaly.clipn.negation import PAIRS
from clipgraft_anomaly.clipn.rejection import Judged, judge, known_classes
from clipgraft_anomaly.clipn.separation import Separated
from clipgraft_anomaly.clipn.unknown_classes import UnknownClasses

torch.set_num_threads(1)


def judged(n=50, c=7, seed=0, spread=4.0):
    g = torch.Generator().manual_seed(seed)
    return Judged(*(spread * torch.randn(n, c, generator=g).double() for _ in range(2)))


def test_n05_shares_of_known_classes_and_of_unknown_sum_to_one_and_one_class_makes_the_rules_one():
    j = judged()
    assert torch.allclose(((1 - j.q) * j.p).sum(1) + j.unknown("atd"), torch.ones(50).double(), atol=1e-12)
    assert torch.allclose(j.q, j.no.exp() / (j.no.exp() + j.yes.exp()))
    lone = judged(c=1)
    assert torch.equal(lone.unknown("atd"), lone.unknown("ctw")) and torch.equal(lone.score("atd"), lone.score("ctw"))


def test_rules_are_the_papers_one_picture_at_a_time():
    j = judged()
    for row in range(50):
        yes, no = j.yes[row].numpy(), j.no[row].numpy()
        p, q = np.exp(yes) / np.exp(yes).sum(), 1 / (1 + np.exp(yes - no))
        k = int(p.argmax())
        chance = 1 - float(((1 - q) * p).sum())
        assert j.unknown("ctw")[row].item() == pytest.approx(float(q[k]))
        assert j.unknown("atd")[row].item() == pytest.approx(chance)
        assert bool(j.rejected("ctw")[row]) == (q[k] > 0.5)
        assert bool(j.rejected("atd")[row]) == (chance > float(p.max()))
        assert j.score("ctw")[row].item() == pytest.approx(np.log((1 - q[k]) / q[k]), abs=1e-6)
        assert j.score("atd")[row].item() == pytest.approx(np.log((1 - chance) / chance), abs=1e-6)
        assert j.score("msp")[row].item() == pytest.approx(np.log(p[k] / (1 - p[k])), abs=1e-6)
        assert j.score("energy")[row].item() == pytest.approx(np.log(np.exp(yes).sum()), abs=1e-6)
    assert 0 < j.rejected("ctw").sum() < 50 and 0 < j.rejected("atd").sum() < 50
    assert torch.equal(j.score("max-logit"), j.yes.amax(1).round(decimals=9))


def test_scores_do_not_saturate_and_an_untrained_branch_ranks_nothing():
    sure = Judged(torch.tensor([[90.0, 0], [80, 0], [70, 0]]).double(), torch.tensor([[0.0, 0]] * 3).double())
    assert (sure.unknown("atd") < 1e-15).any()
    for score in ("atd", "ctw", "msp"):
        assert (sure.score(score)[:-1] > sure.score(score)[1:]).all()
    yes = 30 * torch.randn(40, 9, generator=torch.Generator().manual_seed(0)).double()
    for score in ("atd", "ctw"):
        assert not Judged(yes, yes).score(score).any()
    with pytest.raises(InputError, match="no branch"):
        Judged(yes).score("atd")


def records(known, unknown):
    rows = [*((s, True) for s in known), *((s, False) for s in unknown)]
    return [{"id": str(k), "score": s, "known": side} for k, (s, side) in enumerate(rows)]


def test_n09_alike_scores_give_one_half_and_95_percent():
    scores = [float(k) for k in range(40)]
    rows = records(scores, scores)
    assert value(Separated("auroc"), rows) == 0.5
    assert value(Separated("fpr95"), rows) == 0.95
    same = records([1.0] * 9, [1.0] * 5)
    assert value(Separated("auroc"), same) == 0.5 and value(Separated("fpr95"), same) == 1.0
    apart = records([3.0, 2.0], [1.0, 0.0])
    assert value(Separated("auroc"), apart) == 1.0 and value(Separated("fpr95"), apart) == 0.0
    assert np.isnan(value(Separated("auroc"), records([1.0], [])))


def test_separation_is_scikit_learns_and_draws_are_repeated_rows():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    known, unknown = rng.integers(2, 12, 60), rng.integers(0, 9, 40)  # with ties
    rows = records(known.tolist(), unknown.tolist())
    labels, scores = np.array([r["known"] for r in rows]), np.array([r["score"] for r in rows])
    assert value(Separated("auroc"), rows) == pytest.approx(metrics.roc_auc_score(labels, scores))
    rate, found, _ = metrics.roc_curve(labels, scores, drop_intermediate=False)
    assert value(Separated("fpr95"), rows) == pytest.approx(rate[np.argmax(found >= 0.95)])
    weights = torch.tensor(rng.integers(0, 4, 100)).double()
    repeated = [row for row, n in zip(rows, weights.int().tolist(), strict=True) for _ in range(n)]
    for metric in ("auroc", "fpr95"):
        drawn = Separated(metric).bind(rows)(weights[None])[0].item()
        assert drawn == pytest.approx(value(Separated(metric), repeated))


NAMES = ("red circle", "blue circle", "red star", "blue star")


class Things:
    """Noise with a class; ``seed`` makes other pictures."""

    templates, attributes = ("a photo of a {}", "an image of {}"), {}

    def __init__(self, seed=0, classes=NAMES):
        self.name = self.fingerprint = f"things{seed}"
        self.classes, self.seed = classes, seed

    def __len__(self):
        return 24

    def __getitem__(self, index):
        g = torch.Generator().manual_seed(100 * self.seed + index)
        image = torch.randint(0, 255, (3, 32, 32), generator=g, dtype=torch.uint8)
        return Sample(f"t{index}", image, label=index % len(self.classes), captions=("a photo",))


@pytest.fixture
def world(monkeypatch):
    encoder = tiny_clip().eval().requires_grad_(False)
    branch = NoBranch.copy_of(encoder, no=NoConfig(offsets=3))
    with torch.no_grad():
        for k, p in enumerate(branch.parameters()):
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(k)))
    monkeypatch.setattr(unknown_classes, "branch_for", lambda *_, **__: branch.eval())
    monkeypatch.setattr(unknown_classes, "open_source", lambda ref, **_: Things(seed=int(ref)))
    return encoder, branch.eval()


def brute(encoder, branch, source, places, names):
    """Yes and no logits of single pictures, from the definitions."""
    images = [
        F.normalize(encoder.image(encoder.preprocess.normalize(source[k].image[None] / 255)).pooled) for k in places
    ]
    towers = (lambda ids: encoder.text(ids).pooled, branch)
    heads = []
    for tower in towers:
        rows = []
        for name in names:
            each = [F.normalize(tower(encoder.tokenizer([t.format(name)])), dim=-1) for t in Things.templates]
            rows.append(F.normalize(sum(each), dim=-1)[0])
        heads.append(torch.stack(rows))
    return Judged(*(100 * torch.cat(images).double() @ head.double().T for head in heads))


def test_the_evaluator_counts_what_the_definitions_say(world):
    encoder, branch = world
    source = Things()
    with use(Registry()):
        found = UnknownClasses(known=("circle",), score="ctw")(EncoderFeatures(encoder), source)
    expected = brute(encoder, branch, source, range(24), NAMES[:2])
    label = torch.arange(24) % 4
    known = label < 2
    score = expected.score("ctw")
    by_hand = np.mean([1.0 * (a > b) + 0.5 * (a == b) for a in score[known] for b in score[~known]])
    assert found.metrics["auroc"] == pytest.approx(by_hand, abs=1e-9) == found.metrics["auroc_ctw"]
    rejected = expected.rejected("ctw")
    assert found.metrics["known_rejected"] == pytest.approx(rejected[known].double().mean().item())
    assert found.metrics["unknown_rejected"] == pytest.approx(rejected[~known].double().mean().item())
    right = ~rejected & (expected.best == label)
    assert found.metrics["known_accuracy"] == pytest.approx(right[known].double().mean().item())
    assert found.metrics["known_images"] == found.metrics["unknown_images"] == 12
    for name, statistic in found.statistics.items():
        assert value(statistic, found.samples) == pytest.approx(found.metrics[name])
    for name, (hits, total) in found.counts.items():
        assert hits / total == pytest.approx(found.metrics[name])
    assert len({row["id"] for row in found.samples}) == 24
    assert {"fpr95", "known_rejected"} <= UnknownClasses.lower_is_better


def test_other_data_are_unknown_and_a_model_without_a_branch_has_its_baseline(world, monkeypatch):
    encoder, branch = world
    source, features = Things(), EncoderFeatures(encoder)
    with use(Registry()):
        found = UnknownClasses(ood="1", known=("star",))(features, source)
        assert (found.metrics["known_images"], found.metrics["unknown_images"]) == (12, 36)
        assert found.metrics["auroc"] == found.metrics["auroc_atd"]
        monkeypatch.setattr(unknown_classes, "branch_for", lambda *_, **__: None)
        plain = UnknownClasses(ood="1", known=("star",))(features, source)
        energy = UnknownClasses(ood="1", known=("star",), baseline="energy")(features, source)
        with pytest.raises(InputError, match="is the data"):
            UnknownClasses(ood="0")(features, source)
        with pytest.raises(InputError, match="no class is called 'moon'"):
            UnknownClasses(known=("moon",))(features, source)
        with pytest.raises(InputError, match="every class"):
            UnknownClasses(known=("red", "blue"))(features, source)
    assert plain.metrics["auroc"] == plain.metrics["auroc_msp"] == pytest.approx(found.metrics["auroc_msp"], abs=1e-9)
    assert energy.metrics["auroc"] == plain.metrics["auroc_energy"]
    assert "auroc_atd" not in plain.metrics and "known_rejected" not in plain.metrics
    with pytest.raises(ValueError, match="nothing is unknown"):
        UnknownClasses()
    expected = brute(encoder, branch, source, [2, 3], NAMES[2:])
    assert [row["msp"] for row in found.samples[2:4]] == pytest.approx(expected.score("msp").tolist(), abs=1e-4)


def test_written_negations_bring_their_own_templates():
    encoder = tiny_clip(context=24).eval().requires_grad_(False)
    encoder.data.origin = Origin("nowhere", "tiny")
    branch = NoBranch.copy_of(encoder, no=NoConfig(offsets=0)).eval()
    found = known_classes(encoder, branch, ["cat", "dog"])
    for side, rows in enumerate((found.yes, found.no)):
        each = F.normalize(encoder.text(encoder.tokenizer([p[side].format("dog") for p in PAIRS])).pooled, dim=-1)
        assert torch.allclose(rows[1], F.normalize(each.mean(0), dim=-1), atol=1e-5)
    assert not torch.allclose(found.yes, found.no, atol=1e-3)
    with pytest.raises(InputError, match="give none"):
        known_classes(encoder, branch, ["cat"], ("a {}",))
    with pytest.raises(InputError, match="one or more"):
        known_classes(encoder, branch, [])
    image = F.normalize(torch.randn(3, 16), dim=-1)
    assert torch.allclose(judge(image, found.yes, found.no, scale=7.0).no, 7 * image.double() @ found.no.double().T)
