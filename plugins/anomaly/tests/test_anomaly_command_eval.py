"""``clipgraft anomaly eval`` and the evaluator ``anomaly/inspection``: on exports, in runs, and what is refused."""

import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from clipgraft.checkpoint import open_export, write_export
from clipgraft.errors import InputError
from clipgraft.evaluation import evaluate, records
from clipgraft.execution import run_recipe
from clipgraft.registry import Registry, use
from clipgraft.testing.tiny import tiny_clip
from clipgraft_anomaly import evaluator
from clipgraft_anomaly.anomalyclip.prompts import AnomalyClip, PromptConfig
from clipgraft_anomaly.commands import app
from clipgraft_anomaly.current_head import current_head, use_head
from clipgraft_anomaly.detector import Detection, Detector, DetectorHead, Fits
from clipgraft_anomaly.evaluate import evaluate_detector
from clipgraft_anomaly.evaluator import Inspection, trained_head
from clipgraft_anomaly.inspection import open_inspection
from clipgraft_anomaly.reading import ReadConfig

torch.set_num_threads(1)


def folder(root, parts=("left", "right"), seed=0):
    rng = np.random.default_rng(seed)
    for part in parts:
        for kind in ("good", "good", "scratch", "scratch"):
            where = root / part / "test" / kind
            where.mkdir(parents=True, exist_ok=True)
            number = len(list(where.iterdir()))
            pixels = rng.integers(0, 200, (40, 36, 3)).astype(np.uint8)
            if kind == "scratch":
                damage = np.zeros((40, 36), np.uint8)
                damage[5:20, 5:25], pixels[5:20, 5:25] = 255, 255
                masks = root / part / "ground_truth/scratch"
                masks.mkdir(parents=True, exist_ok=True)
                Image.fromarray(damage).save(masks / f"{number}_mask.png")
            Image.fromarray(pixels).save(where / f"{number}.png")
    return f"mvtec:{root}"


def prompts(encoder, seed=0):
    torch.manual_seed(seed)
    prompt = PromptConfig(context=4, deep_tokens=2, deep_layers=1).resolved(encoder)
    head = AnomalyClip(prompt=prompt, read=ReadConfig(vv_start=2).resolved(encoder), fits=Fits.of(encoder))
    head.settle(encoder)
    return head


@pytest.fixture
def export(tmp_path):
    encoder = tiny_clip(depth=3, context=32).eval()
    return write_export(encoder, tmp_path / "export", components={"anomalyclip": prompts(encoder)})


class Bright(DetectorHead):
    """Red is bad; needs no training."""

    def __init__(self):
        super().__init__()
        self.registered, self.fits = ("hand/bright", {}), Fits()

    def detector(self, encoder):
        return BrightDetector(encoder)


class BrightDetector(Detector):
    method = "bright"

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.size = encoder, 32

    def forward(self, pixels, names=None):
        return Detection(pixels[:, 0].amax((1, 2)), pixels[:, 0])


@pytest.fixture
def registry(monkeypatch):
    """The installed plugins, with the heads of this file instead of hand-written prompts."""
    found = Registry.discover()
    build = found.build
    monkeypatch.setattr(found, "build", lambda k, n, s: Bright() if n == evaluator.UNTRAINED else build(k, n, s))
    with use(found):
        yield found


def invoke(*words, code=0):
    done = CliRunner().invoke(app, ["eval", *map(str, words)])
    if code == 0:
        assert done.exit_code == 0, done.output
    return done


def test_one_json_document_and_files_with_every_number(tmp_path, export):
    data, out = folder(tmp_path / "data"), tmp_path / "out"
    done = invoke(export, "--data", data, "--json", "--out", out, "--batch-size", 3)
    told = json.loads(done.stdout)
    assert told["method"] == "anomalyclip" and told["trained_on_test"] == 0 and told["skipped"] == 0
    assert set(told["objects"]) == {"left", "right"} and told["objects"]["left"]["pictures"] == 4
    assert told["mean"]["aupro"] == pytest.approx(np.mean([told["objects"][o]["aupro"] for o in ("left", "right")]))
    assert json.loads((out / "results.json").read_text()) == told
    stored = records.read(out)["anomaly/inspection"]
    assert stored.metrics["pixel_auroc"] == told["mean"]["pixel_auroc"] and len(stored.samples) == 8
    assert {"id", "object", "kind", "label", "score", "map_max"} <= set(stored.samples[0])
    curves = json.loads((out / "curves.json").read_text())
    assert set(curves["left"]) == {"image ROC", "pixel ROC", "PRO"} and curves["left"]["PRO"]["x"][-1] == 1
    drawn = ET.parse(out / "curves.svg").getroot()
    assert len(drawn.findall(".//{*}polyline")) == 6
    again = json.loads(invoke(export, "--data", data, "--json", "--batch-size", 8).stdout)
    assert again["mean"] == pytest.approx(told["mean"], abs=1e-6)


def test_a_table_for_people_one_part_and_undefined_as_a_dash(tmp_path, export):
    data = folder(tmp_path / "data")
    told = json.loads(invoke(export, "--data", data, "--object", "right", "--json").stdout)
    assert list(told["objects"]) == ["right"] and told["data"].endswith("?object=right")
    for file in (tmp_path / "data/left/test/good").iterdir():
        file.unlink()
    printed = invoke(export, "--data", data, "--class-name", "bracket").stdout
    assert "mean" in printed and "image_auroc is undefined for 1 of 2: left" in printed and "oracle" in printed
    told = json.loads(invoke(export, "--data", data, "--json").stdout)
    assert told["objects"]["left"]["image_auroc"] is None and told["undefined"]["image_auroc"] == ["left"]
    assert told["mean"]["image_auroc"] == told["objects"]["right"]["image_auroc"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{data}"], "--method"),
        (["{export}", "--set", "a=1"], "--method"),
        (["{export}", "--object", "middle"], "middle"),
    ],
)
def test_mistakes_are_told_in_a_line(tmp_path, export, words, said):
    data = folder(tmp_path / "data")
    done = invoke(*[w.format(export=export, data=tmp_path / "data") for w in words], "--data", data, code=2)
    assert isinstance(done.exception, InputError) and said in str(done.exception)


def test_the_evaluator_finds_its_detector(tmp_path, export, registry):
    data = folder(tmp_path / "data").replace("mvtec:", "parts:")
    encoder = tiny_clip(depth=3, context=32).eval()
    source = open_inspection(data)

    def pixel_auroc(model, setting=""):
        return evaluate(model, [f"anomaly/inspection{setting}@{data}"])["anomaly/inspection"].metrics["pixel_auroc"]

    by_hand = evaluate_detector(BrightDetector(encoder), source).mean["pixel_auroc"]
    head = trained_head(export, registry=registry)
    trained = evaluate_detector(head.detector(encoder), source).mean["pixel_auroc"]
    other = evaluate_detector(prompts(encoder, seed=5).detector(encoder), source).mean["pixel_auroc"]
    assert len({by_hand, trained, other}) == 3
    assert pixel_auroc(encoder) == by_hand
    with use_head(prompts(encoder, seed=5)):
        assert pixel_auroc(encoder) == pytest.approx(other)
        assert pixel_auroc(encoder, "?method=anomaly/prompts") == by_hand
        assert pixel_auroc(encoder, f"?from={export}") == pytest.approx(trained)
    assert pixel_auroc(open_export(export)) == pytest.approx(trained)
    with pytest.raises(InputError, match="holds no detector"):
        Inspection(from_=str(tmp_path / "data")).detector(encoder, registry=registry)
    with pytest.raises(InputError, match="was made for"):
        Inspection(from_=str(export)).detector(tiny_clip(depth=2, context=32), registry=registry)
    with pytest.raises(ValueError, match="two detectors"):
        Inspection(method="anomaly/prompts", from_="x")
    with pytest.raises(InputError, match="minimal pairs"):
        Inspection()(None, type("Pairs", (), {"name": "pairs", "patterns": ()})())


def test_a_run_is_measured_before_by_hand_and_after_with_what_it_learnt_also_when_resumed(tmp_path, registry):
    few, others = folder(tmp_path / "few"), folder(tmp_path / "others", ("third",), seed=1)
    base = write_export(tiny_clip(depth=3, context=32).eval(), tmp_path / "base")
    settings = {
        "model.from": str(base), "data.from": few, "prompt.context": 4, "prompt.deep_tokens": 2,
        "train.steps": 3, "train.batch_size": 8, "hooks": ["anomaly/current-head"],
        "evaluate.on": [{"use": "anomaly/inspection", "data": others}],
    }  # fmt: skip
    found = run_recipe("anomalyclip", overrides=settings, out=tmp_path / "run", registry=registry)
    assert current_head() is None
    stored = json.loads((tmp_path / "run/evaluations.json").read_text())
    before, after = (stored[when]["anomaly/inspection"] for when in ("before", "after"))
    assert found.metrics["anomaly/inspection.pixel_auroc"] == after["pixel_auroc"]
    encoder, source = open_export(base).eval(), open_inspection(others)
    by_hand = evaluate_detector(BrightDetector(encoder), source).mean
    assert before["pixel_auroc"] == by_hand["pixel_auroc"]
    head = trained_head(tmp_path / "run", registry=registry)
    learnt = evaluate_detector(head.detector(encoder), source).mean
    assert after["pixel_auroc"] == pytest.approx(learnt["pixel_auroc"]) and after["pixel_ap"] != before["pixel_ap"]
    (tmp_path / "run/evaluations.json").write_text(json.dumps({"before": stored["before"]}))
    again = run_recipe(resume=tmp_path / "run", registry=registry)
    assert again.metrics["anomaly/inspection.pixel_auroc"] == pytest.approx(after["pixel_auroc"])
    # the test set must be another one
    done = invoke(tmp_path / "run", "--data", few, "--json", code=2)
    assert isinstance(done.exception, InputError) and "8 of 8 sampled pictures" in str(done.exception)
    done = invoke(tmp_path / "run/export", "--data", few, "--object", "left", "--json", code=2)
    assert "4 of 8" in str(done.exception) and "--allow-same" in str(done.exception)
    allowed = json.loads(invoke(tmp_path / "run", "--data", few, "--json", "--allow-same").stdout)
    assert allowed["trained_on_test"] == 8
    told = json.loads(invoke(tmp_path / "run", "--data", others, "--json").stdout)
    assert told["mean"]["pixel_auroc"] == pytest.approx(after["pixel_auroc"]) and told["trained_on_test"] == 0
