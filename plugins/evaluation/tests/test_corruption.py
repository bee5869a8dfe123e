"""Corruptions do what their names say, the same each time; accuracies equal passes written out."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from clipgraft.config.schema import EvaluatorNode
from clipgraft.data import open_source
from clipgraft.data.base import BadSample, Sample
from clipgraft.data.transforms import evaluation_transform
from clipgraft.errors import InputError
from clipgraft.evaluation import evaluate
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.evaluation.statistics import intervals, value
from clipgraft.evaluation.zero_shot import ZeroShot
from clipgraft.testing.tiny import tiny_clip
from clipgraft_evaluation import corruptions
from clipgraft_evaluation.corruption import Corrupted, Corruption
from clipgraft_evaluation.corruptions import CORRUPTIONS, STANDARD, corrupt, plasma, smoothed

RANDOM = ("gaussian-noise", "shot-noise", "impulse-noise", "motion-blur", "snow", "fog", "elastic")


def scene(height: int = 224, width: int = 224) -> np.ndarray:
    """Discs and stripes: edges, colours, flat parts."""
    row, column = np.mgrid[:height, :width] / max(height, width)
    disc = (row - 0.5) ** 2 + (column - 0.4) ** 2 < 0.06
    stripes = np.sin(40 * column + 10 * row) > 0
    image = np.stack([0.2 + 0.6 * disc, 0.3 + 0.4 * stripes, 0.5 + 0.3 * row], -1)
    return np.rint(image * 255).astype(np.uint8)


def operate(name: str, image: np.ndarray, severity: int, *, seed: int = 0) -> np.ndarray:
    """Before clipping and rounding."""
    rng = np.random.default_rng(seed)
    return CORRUPTIONS[name](image, severity - 1, rng, min(image.shape[:2]) / 224)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_all_change_the_picture_deterministically_in_any_shape(name: str) -> None:
    image = scene(120, 150)
    kept = image.copy()
    found = [corrupt(image, name, severity, seed="s0") for severity in range(1, 6)]
    assert all(f.shape == image.shape and f.dtype == np.uint8 for f in found) and (image == kept).all()
    assert all((f != image).any() for f in found)
    assert (corrupt(image, name, 3, seed="s0") == found[2]).all()
    differs = (corrupt(image, name, 3, seed="s1") != found[2]).any()
    assert differs == (name in RANDOM or name == "glass-blur")
    for size in ((224, 224), (33, 20), (1, 1)):
        assert corrupt(scene(*size), name, 5, seed="s0").shape == (*size, 3)


@pytest.mark.parametrize("name", [n for n in CORRUPTIONS if n not in ("fog", "elastic", "glass-blur")])
def test_severity_grows(name: str) -> None:
    image = scene()
    lost = [
        np.mean([np.abs(corrupt(image, name, s, seed=str(k)).astype(float) - image).mean() for k in range(4)])
        for s in range(1, 6)
    ]
    assert lost[4] > 1.3 * lost[0]
    assert all(b > 0.99 * a for a, b in pairwise(lost))


def test_noise_has_its_published_strength() -> None:
    grey = np.full((224, 224, 3), 0.5)
    for severity, expected in zip(range(1, 6), (0.08, 0.12, 0.18, 0.26, 0.38), strict=True):
        assert operate("gaussian-noise", grey, severity).std() == pytest.approx(expected, rel=0.02)
    for severity, photons in zip(range(1, 6), (60, 25, 12, 5, 3), strict=True):
        found = operate("shot-noise", grey, severity)
        assert found.mean() == pytest.approx(0.5, abs=0.01)
        assert found.var() == pytest.approx(0.5 / photons, rel=0.03), "a Poisson variable's variance is its mean"
    for severity, share in zip(range(1, 6), (0.03, 0.06, 0.09, 0.17, 0.27), strict=True):
        found = operate("impulse-noise", grey, severity)
        assert [(found == v).mean() for v in (0, 1)] == pytest.approx([share / 2] * 2, rel=0.1)


def test_brightness_is_the_value_of_hsv() -> None:
    color = pytest.importorskip("skimage.color")
    image = np.random.default_rng(0).random((20, 30, 3))
    image[0, 0] = 0
    for severity, more in zip(range(1, 6), (0.1, 0.2, 0.3, 0.4, 0.5), strict=True):
        hsv = color.rgb2hsv(image)
        hsv[..., 2] = np.clip(hsv[..., 2] + more, 0, 1)
        assert operate("brightness", image, severity) == pytest.approx(color.hsv2rgb(hsv), abs=1e-5)


def test_contrast_jpeg_and_pixelate_by_hand() -> None:
    image = scene() / 255
    found = operate("contrast", image, 3)
    assert found.mean((0, 1)) == pytest.approx(image.mean((0, 1)), abs=1e-5)
    assert found.std((0, 1)) == pytest.approx(0.2 * image.std((0, 1)), rel=1e-4)
    stored = io.BytesIO()
    Image.fromarray(scene()).save(stored, "JPEG", quality=10)
    assert (corrupt(scene(), "jpeg", 4, seed="") == np.asarray(Image.open(stored))).all()
    blocks = corrupt(scene(), "pixelate", 5, seed="").reshape(56, 4, 56, 4, 3)
    means = np.rint(scene().reshape(56, 4, 56, 4, 3).mean((1, 3)))
    assert (blocks == blocks[:, :1, :, :1]).all() and np.abs(blocks[:, 0, :, 0] - means).max() <= 1


def test_blurs_spread_a_point_as_they_should() -> None:
    point = np.zeros((224, 224, 3))
    point[112, 112] = 1
    disk = operate("defocus-blur", point, 3)[..., 0]
    row, column = np.mgrid[:224, :224] - 112
    away = np.hypot(row, column)
    assert disk.sum() == pytest.approx(1) and np.abs(disk[away > 7]).max() < 1e-6
    assert disk[away < 5] == pytest.approx(1 / (np.pi * 36), rel=0.02)
    for severity, sigma in zip(range(1, 6), (1, 2, 3, 4, 6), strict=True):
        blurred = operate("gaussian-blur", point, severity)[..., 0]
        assert np.sqrt((blurred * row**2).sum()) == pytest.approx(sigma, rel=0.02)
    angle = np.random.default_rng(0).uniform(-np.pi / 4, np.pi / 4)
    moved = operate("motion-blur", point, 4, seed=0)[..., 0]
    assert moved.sum() == pytest.approx(1)
    weights = np.exp(-(np.arange(31.0) ** 2) / (2 * 12**2))
    reach = -(weights * np.arange(31)).sum() / weights.sum()  # a pixel takes from ahead, so the point moves back
    centre = (moved * row).sum(), (moved * column).sum()
    assert centre == pytest.approx((reach * np.sin(angle), reach * np.cos(angle)), abs=1e-3)
    across = row * np.cos(angle) - column * np.sin(angle)
    assert np.sqrt((moved * across**2).sum()) < 0.7, "a line, no wider than its interpolation"


def test_zoom_blur_keeps_the_centre_and_drags_the_rim() -> None:
    image = np.zeros((224, 224, 3))
    image[:, 110:114] = 1
    image[:, 10:14] = 1
    found = operate("zoom-blur", image, 5)[112, :, 0]
    assert found[112] > 0.95 and found[12] < 0.4
    flat = np.full((40, 60, 3), 0.4)
    assert operate("zoom-blur", flat, 5) == pytest.approx(flat, abs=0.01)


def test_glass_blur_copies_pixels_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corruptions, "_gaussian", lambda x, sigma: x)
    image = np.random.default_rng(1).random((224, 224, 3))
    found, expected = operate("glass-blur", image, 2), image.copy()
    down, right = np.random.default_rng(0).integers(-2, 2, (2, 220 * 220))
    places = [(h, w) for h in range(222, 2, -1) for w in range(222, 2, -1)]
    for (h, w), dy, dx in zip(places, down, right, strict=True):
        expected[h, w] = expected[h + dy, w + dx]
    assert (found == expected).all() and (found != image).mean() > 0.5


def test_fog_keeps_the_brightest_value_and_clouds_wrap_around() -> None:
    cloud = plasma(100, decay=2, rng=np.random.default_rng(0))
    assert cloud.shape == (128, 128) and cloud.min() == 0 and cloud.max() == 1
    steps = [np.abs(np.diff(cloud, axis=axis)).mean() for axis in (0, 1)]
    seams = [np.abs(cloud[0] - cloud[-1]).mean(), np.abs(cloud[:, 0] - cloud[:, -1]).mean()]
    assert max(seams) < 2 * max(steps) < 0.2
    rough = plasma(100, decay=1.4, rng=np.random.default_rng(0))
    assert np.abs(np.diff(rough, axis=0)).mean() > 2 * steps[0]
    assert operate("fog", scene() / 255, 5).max() <= scene().max() / 255 + 1e-6


def test_snow_falls_and_greys() -> None:
    found = operate("snow", np.full((224, 224, 3), (0.5, 0.1, 0.1)), 3)
    assert found.mean() > 0.3
    down, right = (np.abs(np.diff(found[..., 0], axis=axis)).mean() for axis in (0, 1))
    assert down < right, "flakes are longer than wide"


@pytest.mark.parametrize(("size", "sigma"), [((30, 41), 2.44), ((30, 41), 19.5), ((20, 20), 170.8)])
def test_smoothing_is_scipys_gaussian(size: tuple[int, int], sigma: float) -> None:
    field = np.random.default_rng(0).uniform(-1, 1, size)
    expected = ndimage.gaussian_filter(field, sigma, mode="reflect", truncate=3)
    assert smoothed(field, sigma) == pytest.approx(expected, abs=1e-9)


def test_elastic_moves_as_much_at_any_size_and_keeps_flat_pictures() -> None:
    flat = np.full((64, 64, 3), 0.3)
    for severity in range(1, 6):
        assert operate("elastic", flat, severity) == pytest.approx(flat, abs=1e-5)

    def displacement(side: int) -> float:
        """[share of the side], read from a ramp that tells its own column."""
        ramp = np.broadcast_to((np.arange(side) / side)[None, :, None], (side, side, 3))
        inner = slice(side // 4, 3 * side // 4)
        return float(
            np.mean([np.abs(operate("elastic", ramp, 4, seed=k) - ramp)[inner, inner].mean() for k in range(8)])
        )

    assert displacement(56) == pytest.approx(displacement(224), rel=0.35)


# -- the evaluator -----------------------------------------------------------------------------------------------------


class Pictures:
    """Class-coloured stripes as PIL images that need a resize; ``bad`` can't be read."""

    name, templates, attributes = "pictures", ("a {} picture",), {}
    classes = ("red", "green", "blue")

    def __init__(self, n: int = 18, *, bad: tuple[int, ...] = ()) -> None:
        self.n, self.bad, self.fingerprint = n, bad, f"pictures{n}{bad}"

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Sample:
        if index in self.bad:
            raise BadSample(f"p{index}", "truncated")
        image = scene(40, 48).copy()
        image[..., index % 3] = np.minimum(image[..., index % 3].astype(int) + 3 * index + 60, 255)
        return Sample(f"p{index}", Image.fromarray(image), label=index % 3)


def right(encoder: Any, source: Any, name: str, severity: int, *, seed: int = 0) -> dict[str, bool]:
    """One pass written out."""
    features, found = EncoderFeatures(encoder), {}
    weights = features.classifier(source.classes, source.templates)
    for index in range(len(source)):
        sample = source[index]
        pixels = evaluation_transform(encoder.preprocess)(sample.image)
        array = (pixels * 255).round().byte().permute(1, 2, 0).numpy()
        changed = torch.from_numpy(corrupt(array, name, severity, seed=f"{seed}/{sample.id}")).permute(2, 0, 1)
        with torch.no_grad():
            x = encoder.image(encoder.preprocess.normalize(changed[None].float() / 255)).unit()[0]
        scores = weights @ x
        found[sample.id] = bool(scores.argmax() == sample.label)
    return found


def test_accuracies_are_those_of_passes_written_out() -> None:
    encoder, source = tiny_clip(3), Pictures()
    found = Corruption(corruptions=("fog", "jpeg"), severities=(2, 5))(EncoderFeatures(encoder, batch_size=4), source)
    expected = {f"{n}-{s}": right(encoder, source, n, s) for n in ("fog", "jpeg") for s in (2, 5)}
    for row in found.samples:
        for column, answers in expected.items():
            assert row[column] == answers[row["id"]]
        assert row["fog"] == (row["fog-2"] + row["fog-5"]) / 2
    means = {column: sum(answers.values()) / 18 for column, answers in expected.items()}
    clean = ZeroShot()(EncoderFeatures(encoder), source).metrics["top1"]
    mean = sum(means.values()) / 4
    assert found.metrics == pytest.approx(
        {
            "clean": clean,
            "mean": mean,
            "fog": (means["fog-2"] + means["fog-5"]) / 2,
            "jpeg": (means["jpeg-2"] + means["jpeg-5"]) / 2,
            "severity_2": (means["fog-2"] + means["jpeg-2"]) / 2,
            "severity_5": (means["fog-5"] + means["jpeg-5"]) / 2,
            "relative": mean / clean,
        }
    )


def test_statistics_are_the_metrics_and_batches_change_nothing() -> None:
    encoder, source = tiny_clip(3), Pictures()
    features = EncoderFeatures(encoder, batch_size=5)
    found = Corruption(severities=(1, 5))(features, source)
    assert set(found.metrics) == {"clean", "mean", "relative", "severity_1", "severity_5", *STANDARD}
    assert set(found.statistics) == set(found.metrics)
    for name, statistic in found.statistics.items():
        assert value(statistic, found.samples) == pytest.approx(found.metrics[name], abs=1e-9)
    low, high = intervals(found.statistics, found.samples, draws=200)["mean"]
    assert low <= found.metrics["mean"] <= high
    assert Corruption(severities=(1, 5))(EncoderFeatures(encoder, batch_size=64), source) == found
    assert len(features._passes) == 1, "embeddings of corrupted images aren't kept"


def test_a_limit_draws_samples_of_all_classes_and_seeds_count() -> None:
    features, source = EncoderFeatures(tiny_clip(3)), Pictures(90)
    found = Corruption(corruptions=("snow",), severities=(3,), limit=30)(features, source)
    ids = [row["id"] for row in found.samples]
    assert len(set(ids)) == 30 and ids != [f"p{k}" for k in range(30)]
    assert {row["label"] for row in found.samples} == {0, 1, 2}
    view = [Corrupted(source, rows=[4], corruption="snow", severity=3, seed=seed) for seed in (0, 1)]
    assert view[0].fingerprint != view[1].fingerprint
    assert np.asarray(view[0][0].image).tobytes() != np.asarray(view[1][0].image).tobytes()


def test_at_source_corrupts_the_whole_picture() -> None:
    source, preprocess = Pictures(), tiny_clip().preprocess
    whole = Corrupted(source, rows=range(18), corruption="contrast", severity=1)[0]
    seen = Corrupted(source, rows=range(18), corruption="contrast", severity=1, preprocess=preprocess)[0]
    assert whole.image.size == (48, 40) and tuple(seen.image.shape) == (3, 32, 32) and seen.image.dtype == torch.uint8
    assert (np.asarray(whole.image) == corrupt(np.asarray(source[0].image), "contrast", 1, seed="0/p0")).all()
    tensor = Sample("t", torch.from_numpy(scene(32, 32)).permute(2, 0, 1), label=0)
    told: Any = type("One", (Pictures,), {"__getitem__": lambda self, index: tensor})()
    assert Corrupted(told, rows=[0], corruption="jpeg", severity=1)[0].image.size == (32, 32)
    runs = [
        Corruption(corruptions=("contrast",), at=at)(EncoderFeatures(tiny_clip()), source) for at in ("input", "source")
    ]
    assert all(run.metrics.keys() >= {"contrast"} for run in runs)


def test_unreadable_samples_stay_out() -> None:
    found = Corruption(corruptions=("jpeg",), severities=(1,))(EncoderFeatures(tiny_clip()), Pictures(bad=(0, 7)))
    assert len(found.samples) == 16


def one_line(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    assert "unknown corruption 'gausian-noise'; did you mean gaussian-noise" in one_line(
        lambda: Corruption(corruptions=("gausian-noise",))
    )
    assert "frost needs photographs" in one_line(lambda: Corruption(corruptions=("frost",)))
    node = EvaluatorNode(use="evaluation/corruption", data="x", severities=[6])
    assert "severities" in one_line(lambda: evaluate(tiny_clip(), [node]))
    (tmp_path / "a").mkdir()
    Image.fromarray(scene(32, 32)).save(tmp_path / "a" / "0.png")
    alone: Any = open_source(f"folder:{tmp_path}")
    assert "has 1 classes where two" in one_line(lambda: Corruption()(EncoderFeatures(tiny_clip()), alone))
