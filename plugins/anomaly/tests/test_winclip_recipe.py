"""The recipe winclip: which pictures are remembered, what the export holds, and what is refused before any work."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from clipgraft.checkpoint import read_manifest
from clipgraft.data.transforms import evaluation_transform
from clipgraft.errors import InputError
from clipgraft.execution import run_recipe
from clipgraft.registry import Registry
from clipgraft_anomaly.commands import app
from clipgraft_anomaly.detector import detect, open_detector
from clipgraft_anomaly.inspection import open_inspection
from clipgraft_anomaly.winclip_references import draw, normal_pictures, too_few, training_part

pytest.importorskip("clipgraft_toyworld")
torch.set_num_threads(1)
TOY = "toyworld/defects?split=train&n=64&shapes=[moon, heart]"
OTHERS = "toyworld/defects?split=tune&n=32&shapes=[moon, heart]"
FEW = {"model.from": "toyworld/clip", "windows.scales": [2], "windows.size": None, "data.from": TOY}
SAME_WORDS = {"words.normal": ["{}", "flawless {}"], "words.anomalous": ["damaged {}"], "words.templates": ["a {}"]}
QUICK = FEW | SAME_WORDS


@pytest.fixture(scope="module")
def registry():
    return Registry.discover()


def parts(root, names=("bottle", "metal_nut"), train=5):
    rng = np.random.default_rng(0)
    for name in names:
        for where, count in (("train/good", train), ("test/good", 2), ("test/dent", 2)):
            folder = root / name / where
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(rng.integers(0, 200, (40, 36, 3)).astype(np.uint8)).save(folder / f"{number:03}.png")
    return f"mvtec:{root}"


def run(tmp_path, registry, **more):
    return run_recipe("winclip:tiny", overrides=QUICK | more, out=tmp_path / "run", registry=registry)


def test_a_run_gathers_and_its_export_is_a_detector(tmp_path, registry):
    done = run(tmp_path, registry, shots=3, **{"evaluate.on": [{"use": "anomaly/inspection", "data": OTHERS}]})
    manifest = read_manifest(done.export)
    assert manifest["level"] == "L1" and [c["use"] for c in manifest["components"]] == ["anomaly/winclip"]
    detector = open_detector(str(tmp_path / "run"), registry=registry)
    assert set(detector.memory.objects) == {"moon", "heart"}
    assert detector.kept_patches.shape == (2, 3, 16, 128) and detector.kept_windows_2.shape == (2, 3, 9, 64)
    torch.testing.assert_close(detector.kept_patches.norm(dim=-1), torch.ones(2, 3, 16))
    source = open_inspection(TOY, registry=registry)
    for name, places in draw(source, normal_pictures(source), 3, seed=0).places.items():
        assert [source[place].label for place in places] == [0, 0, 0]
        pixels = torch.stack([source[place].image for place in places]).float() / 255
        near = detector.few_shot(detector.views(pixels), [name] * 3)
        assert near.max() < 1e-6
    stored = json.loads((tmp_path / "run/evaluations.json").read_text())
    assert stored["before"]["anomaly/inspection"]["pixel_auroc"] != done.metrics["anomaly/inspection.pixel_auroc"]
    told = json.loads(CliRunner().invoke(app, ["eval", str(tmp_path / "run"), "--data", OTHERS, "--json"]).stdout)
    assert told["mean"]["pixel_auroc"] == pytest.approx(done.metrics["anomaly/inspection.pixel_auroc"])
    assert told["detector"]["memory"]["shots"] == 3 and told["method"] == "winclip"


def test_without_shots_there_are_prompts_alone_and_any_object_is_inspected(tmp_path, registry):
    run(tmp_path, registry, shots=0)
    detector = open_detector(str(tmp_path / "run/export"), registry=registry)
    settings = {
        "words": {key.partition(".")[2]: value for key, value in SAME_WORDS.items()},
        "windows": {"scales": [2]},
    }
    anew = open_detector("toyworld/clip", registry=registry, method="winclip", settings=settings)
    pixels = torch.rand(2, 3, 32, 32)
    a, b = (detect(d, pixels, ["moon", "crown"]) for d in (detector, anew))
    assert torch.equal(a.map, b.map) and torch.equal(a.score, b.score)
    assert all("kept" not in name for name, _ in detector.named_buffers())


def test_pictures_come_from_the_split_train_and_are_recognised_in_a_test_set(tmp_path, registry):
    data = parts(tmp_path / "data")
    settings = {"data.from": f"{data}?object=bottle", "windows.size": 32, "model.from": "toyworld/clip"}
    done = run_recipe("winclip", overrides=SAME_WORDS | settings, out=tmp_path / "run", registry=registry)
    detector = open_detector(str(done.run), registry=registry)
    assert (detector.memory.objects, detector.memory.shots) == (("bottle",), 1)
    assert detector.trained_on.reference == f"{data}?object=bottle&split=train" and detector.trained_on.pictures == 1
    ok = CliRunner().invoke(app, ["eval", str(done.run), "--data", f"{data}?object=bottle", "--json"])
    assert json.loads(ok.stdout)["objects"]["bottle"]["pictures"] == 4
    strange = CliRunner().invoke(app, ["eval", str(done.run), "--data", data, "--json"])
    assert "no normal pictures of 'metal_nut'" in str(strange.exception)
    same = CliRunner().invoke(app, ["eval", str(done.run), "--data", f"{data}?object=bottle&split=train", "--json"])
    assert isinstance(same.exception, InputError) and "1 of 1 sampled pictures" in str(same.exception)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("mvtec:x", "mvtec:x?split=train"),
        ("mvtec:x?object=a", "mvtec:x?object=a&split=train"),
        ("visa:x?split=test", "visa:x?split=test"),
        ("folder:x", "folder:x?split=train"),
        ("csv:x.csv", "csv:x.csv?split=train"),
        ("toyworld/defects?n=4", "toyworld/defects?n=4"),
    ],
)
def test_a_split_is_added_where_there_are_splits_and_none_was_said(registry, given, wanted):
    assert training_part(given, registry=registry) == wanted


def test_the_choice_is_by_seed_and_of_a_kind_alone(tmp_path, registry):
    parts(tmp_path / "data", names=("a", "b"), train=8)
    both, one = (open_inspection(f"mvtec:{tmp_path}/data?split=train{o}", registry=registry) for o in ("", "&object=b"))

    def names(source, seed):
        places = draw(source, normal_pictures(source), 3, seed=seed).places["b"]
        return [source[place].id for place in places]

    assert names(both, 0) == names(one, 0) == names(both, 0) != names(both, 1)
    assert len(set(names(both, 0))) == 3


def test_a_picture_that_can_not_be_read_is_replaced_and_too_few_are_told(tmp_path, registry):
    parts(tmp_path / "data", names=("a",), train=4)
    source = open_inspection(f"mvtec:{tmp_path}/data?split=train", registry=registry)
    normal = normal_pictures(source)
    first = draw(source, normal, 1, seed=0).places["a"][0]
    (tmp_path / "data" / source[first].id).write_bytes(b"no picture")
    places = draw(source, normal, 3, seed=0).places["a"]
    assert len(places) == 3 and first not in places
    with pytest.raises(InputError, match="3 of 4 normal pictures of a can be read"):
        draw(source, normal, 4, seed=0)
    assert "a (4)" in too_few(normal, 5, source=source) and too_few(normal, 4, source=source) == ""


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"data.from": "toyworld/defects?split=train&n=16&damaged=1.0"}, "too few normal pictures for shots 2: "),
        ({"shots": 100}, "lower shots"),
        ({"windows.scales": [2, 5]}, "use scales of 1 to 4"),
        ({"windows.size": 30}, "no multiple"),
        ({"reference": "other", "data.from": TOY.replace("moon, ", "")}, "two kinds of part"),
        ({"data.from": "toyworld/images?n=8"}, "inspection needs two"),
    ],
)
def test_what_can_not_work_is_told_before_any_work(tmp_path, registry, more, said):
    with pytest.raises(InputError, match=said):
        run_recipe(
            "winclip:tiny", overrides=QUICK | {"shots": 2} | more, out=tmp_path / "x", dry_run=True, registry=registry
        )
    assert not (tmp_path / "x").exists()


def test_all_kinds_under_one_name(tmp_path, registry):
    done = run(tmp_path, registry, shots=2, name="thing")
    detector = open_detector(str(done.run), registry=registry)
    assert detector.memory.objects == ("thing",)
    told = CliRunner().invoke(app, ["eval", str(done.run), "--data", OTHERS, "--class-name", "thing", "--json"])
    assert json.loads(told.stdout)["skipped"] == 0


def test_controls_remember_the_next_kind_or_noise(tmp_path, registry):
    found = {}
    for reference in ("own", "other", "noise"):
        folder = f"run-{reference}"
        run_recipe(
            "winclip:tiny",
            overrides=QUICK | {"shots": 2, "reference": reference},
            out=tmp_path / folder,
            registry=registry,
        )
        detector = open_detector(str(tmp_path / folder), registry=registry)
        found[reference] = detector.kept_patches
    own, other, noise = found["own"], found["other"], found["noise"]
    assert torch.equal(own[0], other[1]) and torch.equal(own[1], other[0])
    assert (noise[0] - noise[1]).abs().max() < 1e-6 and (noise - own).abs().max() > 1e-2


def test_a_finished_stage_is_taken_up(tmp_path, registry):
    done = run(tmp_path, registry, shots=2)
    before = open_detector(str(done.run), registry=registry).kept_patches
    (tmp_path / "run/status.json").write_text(json.dumps({"recipe": "anomaly/winclip", "status": "interrupted"}))
    run_recipe(resume=tmp_path / "run", registry=registry)
    assert torch.equal(open_detector(str(done.run), registry=registry).kept_patches, before)


def test_pictures_without_labels_are_inspected_by_the_runs_detector(tmp_path, registry):
    parts(tmp_path / "data", names=("bottle",))
    settings = {"data.from": f"mvtec:{tmp_path}/data", "model.from": "toyworld/clip"}
    done = run_recipe("winclip", overrides=SAME_WORDS | settings, out=tmp_path / "run", registry=registry)
    images, out = tmp_path / "data/bottle/test/dent", tmp_path / "out"
    told = CliRunner().invoke(app, ["predict", str(done.run), "--images", str(images), "--out", str(out), "--json"])
    assert told.exit_code == 0, told.output
    detector = open_detector(str(done.run), registry=registry)
    source = open_inspection(f"mvtec:{tmp_path}/data", registry=registry)
    dent = [source[i] for i in range(4) if source[i].label]
    pixels = torch.stack([evaluation_transform(detector.preprocess)(sample.image) for sample in dent])
    want = dict(zip(("000.png", "001.png"), detect(detector, pixels, ["bottle"] * 2).score.tolist(), strict=True))
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    found = {line["file"]: line["score"] for line in lines if "file" in line}
    assert found == pytest.approx(want, abs=1e-6)
