"""From pictures to an answer, as a user types it: train, threshold, predict, eval; on both published layouts."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipgraft.checkpoint import write_export
from clipgraft.cli import main
from clipgraft.testing.tiny import tiny_clip
from clipgraft_anomaly.predict_lines import read_lines
from clipgraft_anomaly.predict_maps import read_map

torch.set_num_threads(1)
SMALL = ["prompt.context=4", "prompt.deep_tokens=2", "train.batch_size=8", "train.warmup=0", "train.log_every=1"]


def clipgraft(capsys, *words, code=0):
    """One command of the command line; what it printed."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    told = capsys.readouterr()
    assert end.value.code == code, told.err
    return told.out if code == 0 else told.err


def texture(rng, *, part, damaged, size=(40, 36)):
    """Stripes or checks with noise; damage is a bright square. Picture and mask, uint8."""
    y, x = np.mgrid[: size[0], : size[1]]
    base = 60 + 50 * ((x // 4 + (y // 4 if part % 2 else 0)) % 2)
    pixels = np.stack([base, base * 0.8 + 10 * part, base * 0.6], 2) + rng.normal(0, 6, (*size, 3))
    mask = np.zeros(size, np.uint8)
    if damaged:
        top, left = rng.integers(2, size[0] - 16), rng.integers(2, size[1] - 16)
        mask[top : top + 13, left : left + 13] = 1
        pixels[mask > 0] = 250
    return pixels.clip(0, 255).astype(np.uint8), mask


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def mvtec(root, *, parts=("grid", "tile"), each=10, seed=0):
    """<part>/train/good, <part>/test/{good,square}, <part>/ground_truth/square/NNN_mask.png."""
    rng = np.random.default_rng(seed)
    for number, part in enumerate(parts):
        for k in range(each):
            save(root / part / f"train/good/{k:03}.png", texture(rng, part=number, damaged=False)[0])
            save(root / part / f"test/good/{k:03}.png", texture(rng, part=number, damaged=False)[0])
            pixels, mask = texture(rng, part=number, damaged=True)
            save(root / part / f"test/square/{k:03}.png", pixels)
            save(root / part / f"ground_truth/square/{k:03}_mask.png", mask * 255)
    return f"mvtec:{root}"


def visa(root, *, parts=("candle", "fryum"), each=10, seed=1):
    """<part>/Data/{Images,Masks} and split_csv/1cls.csv; masks hold small ids, as the published ones."""
    rng, rows = np.random.default_rng(seed), []
    for number, part in enumerate(parts, start=2):
        for k in range(2 * each):
            file = f"{part}/Data/Images/Normal/{k:04}.JPG"
            save(root / file, texture(rng, part=number, damaged=False)[0])
            rows.append((part, "train" if k < each else "test", "normal", file, ""))
        for k in range(each):
            file, told = f"{part}/Data/Images/Anomaly/{k:03}.JPG", f"{part}/Data/Masks/Anomaly/{k:03}.png"
            pixels, mask = texture(rng, part=number, damaged=True)
            save(root / file, pixels)
            save(root / told, mask * (1 + k % 3))
            rows.append((part, "test", "anomaly", file, told))
    (root / "split_csv").mkdir()
    with (root / "split_csv/1cls.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("object", "split", "label", "image", "mask"), *rows])
    return f"visa:{root}"


def train(capsys, model, data, out, *, steps=40):
    settings = [f"model.from={model}", f"data.from={data}?split=test", *SMALL, f"train.steps={steps}", "train.lr=0.02"]
    told = json.loads(
        clipgraft(capsys, "run", "anomalyclip", *(w for s in settings for w in ("--set", s)), "--out", out, "--json")
    )
    assert told["status"] == "done" and told["steps"] == steps
    (metrics,) = out.glob("stages/*/metrics.jsonl")
    return [json.loads(line)["loss"] for line in metrics.read_text().splitlines()]


def inspect(capsys, run, data, pictures, out):
    """threshold, predict and eval of one run on data it was not trained on; eval's document."""
    chosen = json.loads(
        clipgraft(capsys, "anomaly", "threshold", run, "--data", f"{data}?split=train", "--quantile", "0.9", "--pixel",
                  "--json")
    )  # fmt: skip
    assert chosen["file"] == str(run / "export/thresholds.json")
    assert (chosen["split"], chosen["optimistic"], chosen["score"]["normal"]) == ("train", False, 20)
    assert chosen["score"]["anomalous"] == 0 and chosen["score"]["found"] is None
    assert chosen["score"]["false_alarms"] == 0.1
    told = json.loads(
        clipgraft(capsys, "anomaly", "predict", run, "--images", pictures, "--out", out / "found", "--threshold",
                  "stored", "--json")
    )  # fmt: skip
    header, lines = read_lines(out / "found/predictions.jsonl")
    assert told["pictures"] == len(lines) > 0 and told["unreadable"] == 0
    assert header["thresholds"]["score"] == chosen["score"]["value"]
    assert header["model_sha256"] == chosen["model_sha256"]
    for line in lines:
        assert line["label"] == ("anomalous" if line["score"] >= chosen["score"]["value"] else "normal")
        assert read_map(out / "found" / line["map"]).shape == (line["height"], line["width"]) == (40, 36)
        assert Image.open(out / "found" / line["mask"]).size == Image.open(out / "found" / line["overlay"]).size
    measured = json.loads(
        clipgraft(capsys, "anomaly", "eval", run, "--data", data, "--out", out / "eval", "--json", "--batch-size", "3")
    )
    assert (out / "eval/report.html").stat().st_size > 10_000 and measured["trained_on_test"] == 0
    root, records = Path(data.partition(":")[2]), _records(out / "eval")
    for line in lines:  # the same picture, in a folder of pictures and in a data set
        name = (pictures / line["file"]).relative_to(root).as_posix()
        assert line["score"] == pytest.approx(records[name], abs=1e-5)
    return measured


def _records(folder):
    from clipgraft.evaluation import records

    return {row["id"]: row["score"] for row in records.read(folder)["anomaly/inspection"].samples}


@pytest.mark.slow
def test_train_on_visa_and_inspect_mvtec(tmp_path, capsys):
    model = write_export(tiny_clip(depth=3, context=32).eval(), tmp_path / "clip")
    losses = train(capsys, model, visa(tmp_path / "visa"), tmp_path / "run")
    assert np.mean(losses[-5:]) < 0.97 * np.mean(losses[:5])
    found = inspect(capsys, tmp_path / "run", mvtec(tmp_path / "mvtec"), tmp_path / "mvtec/grid/test/square", tmp_path)
    assert set(found["objects"]) == {"grid", "tile"} and found["objects"]["tile"]["masked"] == 20
    for name in ("image_auroc", "pixel_auroc", "aupro"):
        assert found["mean"][name] == pytest.approx(np.mean([part[name] for part in found["objects"].values()]))
    said = clipgraft(capsys, "anomaly", "eval", tmp_path / "run", "--data", f"visa:{tmp_path / 'visa'}", code=2)
    assert "trained on" in said and "--allow-same" in said


def test_train_on_mvtec_and_inspect_visa(tmp_path, capsys):
    model = write_export(tiny_clip(depth=3, context=32).eval(), tmp_path / "clip")
    losses = train(capsys, model, mvtec(tmp_path / "mvtec"), tmp_path / "run")
    assert np.mean(losses[-5:]) < 0.97 * np.mean(losses[:5])
    pictures = tmp_path / "visa/candle/Data/Images/Anomaly"
    found = inspect(capsys, tmp_path / "run", visa(tmp_path / "visa"), pictures, tmp_path)
    assert set(found["objects"]) == {"candle", "fryum"} and found["objects"]["fryum"]["normal"] == 10


def test_another_export_as_the_tower_and_mistakes_on_the_way(tmp_path, capsys):
    """Few steps; the run's export is itself a tower for the next run."""
    data = mvtec(tmp_path / "mvtec", parts=("grid",), each=4)
    model = write_export(tiny_clip(depth=2, context=32).eval(), tmp_path / "clip")
    train(capsys, model, data, tmp_path / "first", steps=2)
    train(capsys, tmp_path / "first/export", data, tmp_path / "second", steps=2)
    other = mvtec(tmp_path / "other", parts=("tile",), each=4, seed=5)
    said = clipgraft(capsys, "anomaly", "threshold", tmp_path / "second", "--data", other, code=2)
    assert "split=train" in said and said.count("\n") == 1
    wrong = json.loads((tmp_path / "second/export/clipgraft.json").read_text())
    assert [c["use"] for c in wrong["components"]] == ["anomaly/anomalyclip"]
    for file in (tmp_path / "other/tile/ground_truth/square").iterdir():
        file.unlink()
    for command in (["eval"], ["threshold", "--rule", "f1"]):
        where = ["--data", f"{other}?split=test"]
        said = clipgraft(capsys, "anomaly", command[0], tmp_path / "second", *command[1:], *where, code=2)
        assert "mask folder" in said and "is empty" in said
    (tmp_path / "nothing").mkdir()
    predict = ["anomaly", "predict", tmp_path / "second"]
    said = clipgraft(capsys, *predict, "--images", tmp_path / "nothing", "--out", tmp_path / "x", code=2)
    assert "holds no pictures" in said
    said = clipgraft(capsys, *predict, "--folder", "x", code=2)
    assert "--folder" in said or "--images" in said


@pytest.mark.slow
def test_a_tower_that_genhancer_changed_inspects_parts(tmp_path, capsys):
    pytest.importorskip("clipgraft_diffusion")
    base = write_export(tiny_clip(depth=3, context=32).eval(), tmp_path / "clip")
    rng = np.random.default_rng(0)
    for k in range(16):
        save(tmp_path / f"photos/{('a', 'b')[k % 2]}/{k}.png", texture(rng, part=k % 3, damaged=False)[0])
    small = {
        "model.from": base, "data.from": f"folder:{tmp_path / 'photos'}",
        "condition.vec_dim": 16, "condition.txt_dim": 16,
        "denoiser.width": 32, "denoiser.heads": 2, "denoiser.depth": 1, "denoiser.single_depth": 1,
        "denoiser.positions": 4, "evaluate.retention": "none",
    }  # fmt: skip
    for stage in ("generator", "clip"):
        small |= {f"{stage}.train.{k}": v for k, v in (("steps", 2), ("batch_size", 8), ("lr", 0.01), ("warmup", 0))}
    settings = [word for key, value in small.items() for word in ("--set", f"{key}={value}")]
    clipgraft(capsys, "run", "diffusion/genhancer", *settings, "--out", tmp_path / "enhanced", "--json")
    data = mvtec(tmp_path / "mvtec", parts=("grid",), each=6)
    for name, model in (("plain", base), ("enhanced-prompts", tmp_path / "enhanced/export")):
        train(capsys, model, data, tmp_path / name, steps=5)
    other = mvtec(tmp_path / "other", parts=("tile",), each=6, seed=5)
    found = [
        json.loads(clipgraft(capsys, "anomaly", "eval", tmp_path / name, "--data", other, "--json"))
        for name in ("plain", "enhanced-prompts")
    ]
    assert all(0 <= f["mean"]["pixel_auroc"] <= 1 for f in found)
    assert found[0]["mean"]["pixel_auroc"] != found[1]["mean"]["pixel_auroc"]  # the changed tower was in use
