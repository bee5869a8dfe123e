"""Thresholds: rules against brute force, provenance, and the models they are refused for."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from clipgraft.checkpoint import write_export
from clipgraft.errors import InputError
from clipgraft.testing.tiny import tiny_clip
from clipgraft_anomaly.anomalyclip.prompts import AnomalyClip, PromptConfig
from clipgraft_anomaly.choose_threshold import choose, split_of
from clipgraft_anomaly.commands import app
from clipgraft_anomaly.detector import Detection, Detector, Fits, open_detector
from clipgraft_anomaly.inspection import open_inspection
from clipgraft_anomaly.metrics import rank
from clipgraft_anomaly.reading import ReadConfig
from clipgraft_anomaly.thresholds import by_f1, by_pixel_f1, by_quantile, check_model, identity, place, read_thresholds
from clipgraft_anomaly.tiling import Tiling

torch.set_num_threads(1)


class Bright(Detector):
    """The map is the red channel, the score its mean."""

    method = "bright"

    def __init__(self):
        super().__init__()
        self.encoder, self.size = tiny_clip(), 16

    def forward(self, pixels, names=None):
        return Detection(pixels[:, 0].mean((1, 2)), pixels[:, 0])


def parts(root, *, normal=8, anomalous=4, masks=True, seed=0):
    rng = np.random.default_rng(seed)
    for kind, count in (("normal", normal), ("abnormal", anomalous)):
        for k in range(count):
            pixels = rng.integers(0, 120, (16, 16, 3)).astype(np.uint8)
            (root / kind).mkdir(parents=True, exist_ok=True)
            if kind == "abnormal":
                mask = np.zeros((16, 16), np.uint8)
                mask[3:9, 2 + k : 8 + k], pixels[3:9, 2 + k : 8 + k] = 255, 200 + rng.integers(0, 55)
                if masks:
                    (root / "mask").mkdir(exist_ok=True)
                    Image.fromarray(mask).save(root / f"mask/{k}.png")
            Image.fromarray(pixels).save(root / kind / f"{k}.png")
    return f"parts:{root}?split=test"


def export(folder, *, seed=0, depth=2):
    encoder = tiny_clip(depth=depth, context=32).eval()
    torch.manual_seed(seed)
    prompt = PromptConfig(context=4, deep_tokens=2, deep_layers=1).resolved(encoder)
    head = AnomalyClip(prompt=prompt, read=ReadConfig(vv_start=1).resolved(encoder), fits=Fits.of(encoder))
    head.settle(encoder)
    return write_export(encoder, folder, components={"anomalyclip": head})


def invoke(*words, code=0):
    done = CliRunner().invoke(app, [str(word) for word in words])
    if code == 0:
        assert done.exit_code == 0, done.output + repr(done.exception)
    else:
        assert isinstance(done.exception, InputError), repr(done.exception)
    return done


@pytest.mark.parametrize(("count", "quantile"), [(10, 0.9), (200, 0.995), (37, 0.8), (5, 0.995), (5, 1.0), (1, 0.5)])
def test_a_quantile_leaves_at_most_its_share_of_normal_pictures_and_is_the_lowest_such(count, quantile):
    normal = np.random.default_rng(count).random(count)
    found = by_quantile(normal, np.array([2.0, 0.0]), quantile=quantile, of="pictures")
    allowed = (1 - quantile) * count + 1e-9
    assert (normal >= found.value).sum() <= allowed and found.false_alarms == (normal >= found.value).mean()
    lower = normal[normal < found.value].max()
    assert (normal >= lower).sum() > allowed  # a threshold that this picture reaches would be too low
    assert found.found == 0.5 and (found.normal, found.anomalous) == (count, 2)


def test_ties_of_normal_scores_stay_within_the_share():
    normal = np.array([0.1] * 6 + [0.9] * 4)
    assert by_quantile(normal, np.array([]), quantile=0.7, of="x").false_alarms == 0
    assert by_quantile(normal, np.array([]), quantile=0.6, of="x").value == pytest.approx(0.1, abs=1e-5)
    with pytest.raises(InputError, match="needs normal pictures"):
        by_quantile(np.array([]), normal, quantile=0.9, of="x")


def test_f1_is_the_largest_of_all_thresholds_by_brute_force():
    rng = np.random.default_rng(3)
    normal, anomalous = rng.normal(0, 1, 40).round(1), rng.normal(1, 1, 25).round(1)

    def f1(threshold):
        hits, wrong = (anomalous >= threshold).sum(), (normal >= threshold).sum()
        return 2 * hits / (hits + wrong + len(anomalous))

    found = by_f1(normal, anomalous, of="pictures")
    assert found.f1 == pytest.approx(max(f1(t) for t in np.concatenate([normal, anomalous])))
    assert f1(found.value) == pytest.approx(found.f1) and found.value not in np.concatenate([normal, anomalous])
    for missing in ((normal, np.array([])), (np.array([]), anomalous)):
        with pytest.raises(InputError, match="--rule quantile"):
            by_f1(*missing, of="pictures")
    counts = rank(anomalous, normal)
    local = by_pixel_f1(counts)
    assert local.f1 == pytest.approx(found.f1) and f1(local.value) == pytest.approx(local.f1)
    assert local.false_alarms == (normal >= local.value).mean() and local.found == (anomalous >= local.value).mean()


def test_choosing_from_a_folder_equals_choosing_from_its_pixels(tmp_path):
    data = parts(tmp_path / "data")
    source, detector = open_inspection(data), Bright()
    pixels = [np.asarray(Image.open(tmp_path / "data" / row.image))[..., 0] / 255 for row in source.rows]
    labels = np.array([row.label for row in source.rows])
    means, tops = (np.array([f(p) for p in pixels]) for f in (np.mean, np.max))
    how = {"data": data, "split": "test", "model": "m", "sha256": "s", "pixel": True}
    found = choose(detector, source, rule="quantile", quantile=0.9, **how)
    assert found.score.value == pytest.approx(means[labels == 0].max(), abs=1e-5)
    assert found.pixel.value == pytest.approx(tops[labels == 0].max(), abs=1e-5)
    assert (found.pictures, found.score.normal, found.score.anomalous, found.optimistic) == (12, 8, 4, True)
    assert found.fingerprint == source.fingerprint and found.quantile == 0.9
    best = choose(detector, source, rule="f1", **how)
    masks = [np.asarray(Image.open(tmp_path / f"data/mask/{k}.png")) > 0 for k in range(4)]
    damaged = [p for p, label in zip(pixels, labels, strict=True) if label]
    inside = np.concatenate([p[mask] for p, mask in zip(damaged, masks, strict=True)])
    total = np.concatenate([p.ravel() for p in pixels])
    scores = {t: 2 * (inside >= t).sum() / ((total >= t).sum() + len(inside)) for t in np.unique(inside)}
    assert best.pixel.f1 == pytest.approx(max(scores.values())) and best.quantile is None
    assert (best.pixel.anomalous, best.pixel.normal) == (len(inside), len(total) - len(inside))
    no_masks = open_inspection(parts(tmp_path / "bare", masks=False))
    with pytest.raises(InputError, match="needs masks"):
        choose(detector, no_masks, rule="f1", **how)


def test_unreadable_pictures_are_counted(tmp_path):
    data = parts(tmp_path / "data")
    (tmp_path / "data/normal/x.png").write_bytes(b"no picture")
    found = choose(Bright(), open_inspection(data), data=data, split="test", model="m", sha256="s")
    assert (found.pictures, found.unreadable) == (12, 1)


def test_a_split_must_be_named():
    assert split_of("mvtec:d?object=a&split=train") == "train"
    with pytest.raises(InputError, match=r"mvtec:d\?object=a&split=train"):
        split_of("mvtec:d?object=a")


def test_the_command_stores_where_the_number_comes_from_and_predict_uses_it(tmp_path):
    model, data = export(tmp_path / "export"), parts(tmp_path / "data")
    told = json.loads(invoke("threshold", model, "--data", data, "--pixel", "--json", "--quantile", 0.8).stdout)
    assert told["file"] == str(model / "thresholds.json") == str(place(str(model)))
    stored = read_thresholds(model / "thresholds.json")
    assert stored.model_dump(mode="json", by_alias=True) == {k: v for k, v in told.items() if k != "file"}
    assert (stored.rule, stored.quantile, stored.data, stored.split) == ("quantile", 0.8, data, "test")
    assert stored.optimistic and "optimistic" in stored.source() and stored.date.endswith("Z")
    assert open_detector(str(model), registry=_registry()) is not None  # the export is still whole
    images = ["--images", tmp_path / "data/normal", "--out", tmp_path / "out", "--batch-size", 3]
    done = json.loads(invoke("predict", model, *images, "--threshold", "stored", "--json").stdout)
    assert done["anomalous"] == round(stored.score.false_alarms * 8) == 1
    assert done["thresholds"]["pixel"] == stored.pixel.value
    assert "0.8 quantile" in done["thresholds"]["source"] and "optimistic" in done["thresholds"]["source"]
    printed = invoke("threshold", model, "--data", data, "--rule", "f1").stdout
    assert "largest F1" in printed and "optimistic" in printed and "F1 1.0000" in printed
    train = data.replace("?split=test", "?split=train")
    assert "no picture of split train" in str(invoke("threshold", model, "--data", train, code=2).exception)


def _registry():
    from clipgraft.registry import current

    return current()


def test_thresholds_of_another_detector_are_refused(tmp_path):
    model, other, data = export(tmp_path / "a"), export(tmp_path / "b", seed=1), parts(tmp_path / "data")
    images = ["--images", tmp_path / "data/normal", "--out", tmp_path / "out"]
    assert "missing" in str(invoke("predict", model, *images, "--threshold", "stored", code=2).exception)
    invoke("threshold", model, "--data", data)
    (other / "thresholds.json").write_bytes((model / "thresholds.json").read_bytes())
    refused = str(invoke("predict", other, *images, "--threshold", "stored", code=2).exception)
    assert "another detector" in refused and str(model) in refused
    tiles = ["--tile", 8, "--overlap", 2]
    refused = str(invoke("predict", model, *images, *tiles, "--threshold", "stored", code=2).exception)
    assert "--tile" in refused
    invoke("threshold", model, "--data", data, *tiles, "--out", tmp_path / "tiles.json")
    invoke("predict", model, *images, *tiles, "--threshold", tmp_path / "tiles.json", "--no-overlays")
    (tmp_path / "bad.json").write_text('{"score": 1}')
    words = str(invoke("predict", model, *images, "--threshold", tmp_path / "bad.json", code=2).exception)
    assert "holds no thresholds" in words
    assert "neither a number nor a file" in str(
        invoke("predict", model, *images, "--threshold", "high", code=2).exception
    )
    assert not list((tmp_path / "data").rglob("thresholds.json"))


def test_a_detectors_identity_is_that_of_weights_settings_and_tiles(tmp_path):
    model = export(tmp_path / "a")
    first, again = (open_detector(str(model), registry=_registry()) for _ in range(2))
    assert identity(first) == identity(again) and len(identity(first)) == 64
    others = {identity(first, Tiling(8, 2)), identity(first, Tiling(8, 3))}
    again.texts[0, 0] += 1e-6
    others.add(identity(again))
    first.encoder.image.tower.ln_post.weight.data[0] += 1e-6
    others.add(identity(first))
    third = open_detector(str(model), registry=_registry())
    assert len(others | {identity(third)}) == 5
    with pytest.raises(InputError, match="make it again"):
        check_model(_stored(tmp_path), "0" * 64, path=tmp_path / "x")


def _stored(tmp_path):
    data = parts(tmp_path / "some")
    return choose(Bright(), open_inspection(data), data=data, split="test", model="m", sha256="1" * 64)


def test_methods_without_training_keep_thresholds_where_they_are_told_to(tmp_path):
    data, model = parts(tmp_path / "data"), write_export(tiny_clip(context=48).eval(), tmp_path / "plain")
    common = ["--method", "prompts", "--class-name", "dog"]
    assert "--out FILE" in str(invoke("threshold", "toyworld/clip", *common, "--data", data, code=2).exception)
    invoke("threshold", model, *common, "--data", data, "--out", tmp_path / "t.json")
    assert read_thresholds(tmp_path / "t.json").class_name == "dog"
    told = json.loads(
        invoke("predict", model, *common, "--images", tmp_path / "data", "--out", tmp_path / "out", "--threshold",
               tmp_path / "t.json", "--json").stdout
    )  # fmt: skip
    assert told["method"] == "prompts" and told["pictures"] == 16
