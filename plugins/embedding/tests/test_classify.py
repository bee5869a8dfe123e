from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch

from clipgraft.cli import main
from clipgraft.data.folder import open_folder
from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.testing.tiny import tiny_clip
from clipgraft_embedding.classify import Classifier, classify, open_images, read_templates

LABELS = ("cat", "dog", "red square", "car")


def by_hand(encoder: Encoder, source: object, labels: tuple[str, ...], template: str) -> list[list[float]]:
    """Softmax over scaled cosines in plain Python."""
    assert encoder.text is not None
    with torch.no_grad():
        words = encoder.text(encoder.tokenizer([template.format(label) for label in labels])).pooled.tolist()
    images = EncoderFeatures(encoder).images(source).tolist()  # type: ignore[arg-type]
    scale, found = math.exp(float(encoder.logit_scale.detach())), []
    for image in images:
        cosines = [
            sum(a * b for a, b in zip(image, word, strict=True))
            / math.sqrt(sum(a * a for a in image) * sum(b * b for b in word))
            for word in words
        ]
        powers = [math.exp(scale * cosine) for cosine in cosines]
        found.append([power / sum(powers) for power in powers])
    return found


@pytest.mark.parametrize("kind", ["vit", "siglip-timm"])
def test_probabilities_are_a_hand_computation(kind: str, photos: Path) -> None:
    encoder, source, bad = tiny_clip(seed=5, kind=kind).eval(), open_folder(photos), list[str]()  # type: ignore[arg-type]
    with torch.no_grad():
        encoder.logit_scale.fill_(math.log(37.0))
    found = list(classify(Classifier(encoder, LABELS), source, top=3, batch_size=7, workers=0, bad=bad))
    expected = by_hand(encoder, source, LABELS, "a photo of a {}.")
    assert len(found) == 39 and bad == ["011.jpg: not an image that can be read"]
    for verdict, line in zip(found, expected, strict=True):
        order = sorted(range(4), key=lambda k, line=line: -line[k])[:3]
        assert verdict.probabilities == pytest.approx([line[k] for k in order], abs=1e-5)
        assert verdict.labels == tuple(LABELS[k] for k in order)


def run(capsys: pytest.CaptureFixture[str], *args: str | Path, code: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["classify", *map(str, args)])
    shown = capsys.readouterr()
    assert stopped.value.code == code, shown.err
    return shown.out, shown.err


def test_every_output_says_the_same(
    model: str, encoder: Encoder, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    options = (model, "--images", photos, "--labels", ",".join(LABELS), "--top", "2", "--batch-size", "16")
    document = json.loads(run(capsys, *options, "--json")[0])
    expected = by_hand(encoder, open_folder(photos), LABELS, "a photo of a {}.")
    tops = {row["id"]: row["top"] for row in document["results"]}
    assert len(tops) == document["classified"] == 39 and document["unreadable"][0].startswith("011.jpg")
    assert tops["000.jpg"][0]["probability"] == pytest.approx(max(expected[0]), abs=1e-5)
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        shown, err = run(capsys, *options, "--out", tmp_path / name)
        assert "39 images" in shown and "unreadable: 011.jpg" in err
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert {line["id"]: line["top"] for line in lines} == tops
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    table = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    assert len(rows) == len(table) == 39
    for row, other in zip(rows, table, strict=True):
        first, second = tops[row["id"]]
        assert (row["label"], row["label_2"]) == (first["label"], second["label"]) == (other["label"], other["label_2"])
        assert float(row["probability"]) == other["probability"] == first["probability"]
    shown, err = run(capsys, *options)
    first, second = tops["000.jpg"]
    assert shown.splitlines()[0].split() == [
        "000.jpg", *first["label"].split(), f"{first['probability']:.4f}", *second["label"].split(),
        f"{second['probability']:.4f}",
    ]  # fmt: skip
    assert len(shown.splitlines()) == 39 and "unreadable: 011.jpg" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "a.jsonl", "a.parquet"]


def test_nested_folders_and_single_files(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    for place in ("a.jpg", "deep/b.jpg", "deep/er/c.jpg", ".hidden/d.jpg"):
        (tmp_path / place).write_bytes((photos / "001.jpg").read_bytes())
    source = open_images(str(tmp_path))
    assert [source[k].id for k in range(len(source))] == ["a.jpg", "deep/b.jpg", "deep/er/c.jpg"]
    single = open_images(str(tmp_path / "deep" / "b.jpg"))
    assert len(single) == 1 and single[0].id == "b.jpg"
    assert len(open_images(f"folder:{photos}")) == 40


def test_labels_and_templates_come_from_files(
    model: str, encoder: Encoder, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "labels.txt").write_text("cat\n\n dog \n")
    (tmp_path / "templates.txt").write_text("a picture of the {}\n")
    options = (model, "--images", photos / "001.jpg", "--labels-file", tmp_path / "labels.txt", "--json")
    document = json.loads(run(capsys, *options, "--templates", tmp_path / "templates.txt")[0])
    assert document["labels"] == ["cat", "dog"]
    expected = by_hand(encoder, open_images(str(photos / "001.jpg")), ("cat", "dog"), "a picture of the {}")
    assert document["results"][0]["top"][0]["probability"] == pytest.approx(max(expected[0]), abs=1e-5)
    assert [len(read_templates(name)) for name in ("plain", "simple", "openai")] == [0, 7, 80]
    assert all(template.count("{}") == 1 for template in read_templates("openai"))


def test_labels_that_the_model_cannot_tell_apart_are_named(
    model: str, encoder: Encoder, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = " ".join(["long"] * encoder.tokenizer.context_length)  # what follows is cut off
    labels = (f"{long} cat", "dog", f"{long} horse")
    assert Classifier(encoder, labels).alike() == [labels[0], labels[2]]
    assert Classifier(encoder, LABELS).alike() == []
    assert "choose words it knows" in run(capsys, model, "--images", photos, "--labels", ",".join(labels))[1]
    assert "choose words it knows" not in run(capsys, model, "--images", photos, "--labels", ",".join(LABELS))[1]


def test_bad_input_is_one_line(model: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bare.txt").write_text("no place for the name\n")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "broken.jpg").write_bytes(b"x")

    def error(*args: str | Path, images: Path = photos) -> str:
        err = run(capsys, model, "--images", images, *args, code=2)[1]
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        return lines[0]

    two = ("--labels", "cat,dog")
    assert "give the classes once" in error()
    assert "give the classes once" in error(*two, "--labels-file", tmp_path / "empty.txt")
    assert "no label was given" in error("--labels", " , ")
    assert "one label (cat) was given where two or more compete" in error("--labels", "cat")
    assert "'cat' is there twice" in error("--labels", "cat,cat")
    assert "is empty; write one label per line" in error("--labels-file", tmp_path / "empty.txt")
    assert "can't be read as text" in error("--labels-file", tmp_path / "nowhere.txt")
    assert "nor a file with one template per line" in error(*two, "--templates", "fancy")
    assert "must hold {} once" in error(*two, "--templates", tmp_path / "bare.txt")
    assert "let its name end in" in error(*two, "--out", tmp_path / "a.txt")
    assert "no image found" in error(*two, images=tmp_path / "nothing")
    assert "unknown dataset 'nowhere'" in error(*two, images=Path("nowhere:"))
    assert "is neither a folder nor an image; as data: unknown dataset" in error(*two, images=tmp_path / "gone")
    out = tmp_path / "a.csv"
    assert "no image that can be read" in error(*two, "--out", out, images=tmp_path / "broken.jpg")
    assert not out.exists() and not list(tmp_path.glob(".*")), "nothing half-written is left"


def test_an_encoder_without_texts_is_refused() -> None:
    encoder = tiny_clip()
    encoder.text, encoder.data.tokenizer = None, None
    with pytest.raises(InputError, match="has no text tower"):
        Classifier(encoder, LABELS)
