"""A detector over a data set: rows per part, means, what is undefined, batches, files and worlds."""

import numpy as np
import pytest
import torch
from PIL import Image

from clipgraft.data.base import Sample
from clipgraft.encoders.base import Preprocess
from clipgraft.errors import ClipgraftError, InputError
from clipgraft.evaluation.statistics import intervals, value
from clipgraft_anomaly.detector import Detection, Detector
from clipgraft_anomaly.evaluate import IMAGE, METRICS, evaluate_detector
from clipgraft_anomaly.inspection import mask_of, open_inspection, resized_mask
from clipgraft_anomaly.pixels import Pixels

torch.set_num_threads(1)


class Brightness(Detector):
    """A pixel's score is its red channel, a picture's the largest; it keeps the batches that it saw."""

    method = "brightness"

    def __init__(self, size=16, broken=""):
        super().__init__()
        self.size, self.batches, self.names, self.broken = size, [], [], broken

    @property
    def preprocess(self):
        return Preprocess((self.size, self.size), (0, 0, 0), (1, 1, 1), resize_mode="squash")

    def forward(self, pixels, names=None):
        self.batches.append(len(pixels))
        self.names += names
        maps = pixels[:, 0].clone()
        if self.broken:
            maps[-1, 0, 0] = float(self.broken)
        return Detection(maps.amax((1, 2)), maps)


def tree(root, part, *, normal=3, anomalous=3, size=16, masks=True, seed=0):
    """MVTec's layout: noise, and damage that is brighter."""
    rng = np.random.default_rng([seed, len(part)])
    for kind, count in (("good", normal), ("scratch", anomalous)):
        for n in range(count):
            pixels = rng.integers(0, 120, (size, size, 3)).astype(np.uint8)
            damage = np.zeros((size, size), np.uint8)
            if kind != "good":
                damage[2:6, 3 + n : 8 + n] = 255
                pixels[damage > 0] = np.minimum(pixels[damage > 0] + 60, 255)
                if masks:
                    where = root / part / "ground_truth/scratch" / f"{n:03}_mask.png"
                    where.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(damage).save(where)
            where = root / part / "test" / kind / f"{n:03}.png"
            where.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(where)
    (root / part / "test").mkdir(parents=True, exist_ok=True)


def test_rows_per_part_their_mean_and_a_last_batch_of_one(tmp_path):
    sklearn = pytest.importorskip("sklearn.metrics")
    tree(tmp_path, "bottle", normal=4, anomalous=5)
    tree(tmp_path, "nut", normal=3, anomalous=1)
    source = open_inspection(f"mvtec:{tmp_path}")
    detector = Brightness()
    found = evaluate_detector(detector, source, batch_size=4)
    assert detector.batches == [4, 4, 4, 1] and [p.object for p in found.parts] == ["bottle", "nut"]
    assert detector.names == ["bottle"] * 9 + ["nut"] * 4
    for part in found.parts:
        places = [k for k in range(len(source)) if source.rows[k].object == part.object]
        reds = np.stack([np.asarray(source[k].image)[..., 0] / np.float32(255) for k in places])
        masks = np.stack([mask_of(source, k, source[k]).numpy() for k in places])
        labels = np.array([source.rows[k].label for k in places])
        assert part.metrics["image_auroc"] == pytest.approx(sklearn.roc_auc_score(labels, reds.max((1, 2))))
        assert part.metrics["image_ap"] == pytest.approx(sklearn.average_precision_score(labels, reds.max((1, 2))))
        assert part.metrics["pixel_auroc"] == pytest.approx(sklearn.roc_auc_score(masks.ravel(), reds.ravel()))
        assert part.metrics["pixel_ap"] == pytest.approx(sklearn.average_precision_score(masks.ravel(), reds.ravel()))
        assert part.counts["pictures"] == part.counts["masked"] == len(places)
        assert part.counts["regions"] == part.counts["anomalous"] == labels.sum()
        assert set(part.curves) == {"image ROC", "pixel ROC", "PRO"}
        called = np.array([r["score"] for r in found.records if r["object"] == part.object]) >= part.threshold
        assert sklearn.f1_score(labels, called) == pytest.approx(part.metrics["image_f1_max"])
    for name in METRICS:
        assert found.mean[name] == pytest.approx(np.mean([p.metrics[name] for p in found.parts]))
    assert [r["id"] for r in found.records] == [row.image for row in source.rows]
    assert {r["kind"] for r in found.records} == {"good", "scratch"} and not found.undefined
    alone = evaluate_detector(Brightness(), source, batch_size=13)
    assert alone.mean == found.mean and alone.records == found.records


def test_what_is_undefined_is_null_left_out_of_the_mean_and_counted(tmp_path):
    tree(tmp_path, "bottle")
    tree(tmp_path, "flawless", anomalous=0)
    tree(tmp_path, "broken", normal=0)
    tree(tmp_path, "unmarked", masks=False)
    found = evaluate_detector(Brightness(), open_inspection(f"mvtec:{tmp_path}"))
    rows = {part.object: part for part in found.parts}
    assert rows["flawless"].metrics == dict.fromkeys(METRICS)
    assert [rows["broken"].metrics[m] for m in IMAGE] == [None] * 3 and rows["broken"].metrics["pixel_auroc"] > 0.5
    assert rows["unmarked"].metrics["image_auroc"] > 0 and rows["unmarked"].metrics["aupro"] is None
    assert found.mean["image_auroc"] == pytest.approx(
        (rows["bottle"].metrics["image_auroc"] + rows["unmarked"].metrics["image_auroc"]) / 2
    )
    assert found.undefined["image_auroc"] == ["broken", "flawless"]
    assert found.undefined["aupro"] == ["flawless", "unmarked"]
    evaluation = found.evaluation()
    assert evaluation.metrics["undefined"] == sum(map(len, found.undefined.values())) == 3 * 2 + 5 * 2
    assert evaluation.lower == {"undefined"} and evaluation.metrics["objects"] == 4
    assert any("3 of 9 anomalous pictures have no mask" in note for note in found.notes)
    assert found.as_dict()["objects"]["flawless"]["aupro"] is None


def test_metrics_of_pictures_follow_from_the_records(tmp_path):
    tree(tmp_path, "bottle", normal=6, anomalous=6)
    tree(tmp_path, "nut", normal=5, anomalous=4, seed=3)
    tree(tmp_path, "flawless", anomalous=0)
    evaluation = evaluate_detector(Brightness(), open_inspection(f"mvtec:{tmp_path}")).evaluation()
    assert set(evaluation.statistics) == set(IMAGE)
    for name, statistic in evaluation.statistics.items():
        assert value(statistic, evaluation.samples) == pytest.approx(evaluation.metrics[name], abs=1e-12)
    spans = intervals(evaluation.statistics, evaluation.samples, draws=200)
    for name in IMAGE:
        low, high = spans[name]
        assert 0 <= low <= evaluation.metrics[name] + 1e-9 and high <= 1
    # drawing a record twice is having it twice
    rows = list(evaluation.samples)
    weights = torch.ones(1, len(rows), dtype=torch.float64)
    weights[0, 1], weights[0, 8] = 2, 0
    doubled = [*rows[:8], *rows[9:], rows[1]]
    for statistic in evaluation.statistics.values():
        assert float(statistic.bind(rows)(weights)) == pytest.approx(value(statistic, doubled))


class World:
    """Pictures as tensors with masks in ``extra``; the object is an attribute named ``shape``."""

    name, fingerprint, classes, templates = "world", "world", ("flawless", "damaged"), ()
    attributes = {"shape": ("moon", "heart", "unseen"), "kind": ("flawless", "hole")}  # noqa: RUF012

    def __len__(self):
        return 24

    def __getitem__(self, index):
        image = torch.randint(0, 255, (3, 32, 32), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
        mask, damaged = torch.zeros(32, 32, dtype=torch.uint8), index % 3 == 0
        mask[4:9, index : index + 6] = damaged
        known = {"shape": index % 2, "kind": int(damaged)}
        return Sample(f"w{index}", image, label=int(damaged), attributes=known, extra={"mask": mask})


def test_masks_in_extra_and_pictures_as_tensors_work_too():
    source, detector = World(), Brightness(32)
    found = evaluate_detector(detector, source, batch_size=7, name="thing")
    assert {p.object for p in found.parts} == {"moon", "heart"} and set(detector.names) == {"thing"}
    assert {r["kind"] for r in found.records} == {"flawless", "hole"}
    for part in found.parts:
        pixels = Pixels()
        for sample in (source[k] for k in range(24)):
            if source.attributes["shape"][sample.attributes["shape"]] == part.object:
                pixels.add((sample.image[0].float() / 255).numpy(), sample.extra["mask"].numpy())
        assert part.metrics["pixel_auroc"] == pixels.measure()[0].auroc and part.counts["regions"] == pixels.regions


def test_unreadable_pictures_and_masks_are_counted_and_the_others_keep_their_masks(tmp_path):
    tree(tmp_path, "bottle", normal=4, anomalous=4)
    whole = evaluate_detector(Brightness(), open_inspection(f"mvtec:{tmp_path}"))
    (tmp_path / "bottle/test/good/001.png").write_bytes(b"no picture")
    (tmp_path / "bottle/ground_truth/scratch/002_mask.png").write_bytes(b"no mask")
    source = open_inspection(f"mvtec:{tmp_path}")
    found = evaluate_detector(Brightness(), source, batch_size=3)
    assert found.skipped == 1 and len(found.records) == 7
    assert found.parts[0].counts["masked"] == 6
    assert any("can't be read" in note for note in found.notes)
    assert any("mask 002_mask.png" in note for note in found.notes)
    kept = {r["id"]: r for r in whole.records}
    assert all(r["score"] == kept[r["id"]]["score"] for r in found.records)
    pixels = Pixels()
    for k, row in enumerate(source.rows):
        if not row.image.endswith(("good/001.png", "scratch/002.png")):
            sample = source[k]
            pixels.add(np.asarray(sample.image)[..., 0] / np.float32(255), mask_of(source, k, sample).numpy())
    assert found.parts[0].metrics["aupro"] == pytest.approx(pixels.measure()[0].aupro)


def test_large_pictures_and_their_masks_are_squashed_alike(tmp_path):
    tree(tmp_path, "bottle", size=48)
    source = open_inspection(f"mvtec:{tmp_path}")
    found = evaluate_detector(Brightness(16), source)
    small = resized_mask(source.mask(5), 16)
    assert small.shape == (16, 16) and 0 < int(small.sum()) < 16 and found.parts[0].counts["masked"] == 6
    vanishing = evaluate_detector(Brightness(2), source)
    assert any("vanishes at 2 px" in note for note in vanishing.notes)
    assert vanishing.parts[0].metrics["aupro"] is None and vanishing.parts[0].metrics["image_auroc"] is not None


def test_scores_that_are_no_numbers_and_foreign_labels_are_refused(tmp_path):
    tree(tmp_path, "bottle")
    with pytest.raises(ClipgraftError, match="no number"):
        evaluate_detector(Brightness(broken="nan"), open_inspection(f"mvtec:{tmp_path}"))
    world = World()
    world.classes = ("a", "b", "c")
    with pytest.raises(InputError, match="two, normal"):
        evaluate_detector(Brightness(32), world)
