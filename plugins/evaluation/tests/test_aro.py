"""``aro:DIR``: relations and attributes cut out of Visual Genome's images, and the order of words."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from clipgraft.data import open_source
from clipgraft.data.base import BadSample
from clipgraft.errors import InputError
from clipgraft.evaluation import evaluate, statistics
from clipgraft.testing.tiny import tiny_clip
from clipgraft_evaluation.aro import SYMMETRIC, clean, open_aro, shuffled_trigrams

RELATIONS = ("riding", "under", "next to")
CAPTION = "A red dog, sitting next to two small cats on a mat."


def relation(k: int) -> dict[str, Any]:
    return {
        "image_id": str(k),
        "image_path": f"{k % 4}.jpg",
        "bbox_x": k % 5,
        "bbox_y": 2,
        "bbox_w": 10,
        "bbox_h": 8 + k % 3,
        "relation_name": RELATIONS[k % 3],
        "true_caption": f"the cat {k} is {RELATIONS[k % 3]} the dog",
        "false_caption": f"the dog is {RELATIONS[k % 3]} the cat {k}",
    }


def attribution(k: int) -> dict[str, Any]:
    entry = {key: value for key, value in relation(k).items() if key != "relation_name"}
    names = ["red", "small"] if k < 25 else ["blue", "large"]
    return entry | {"attributes": names, "obj1_name": "cat", "obj2_name": "dog"}


def write(root: Path, relations: int = 9, attributions: int = 30) -> str:
    """Both files and four images; the path."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    for name, entries in {
        "relation": [relation(k) for k in range(relations)],
        "attribution": [attribution(k) for k in range(attributions)],
    }.items():
        (root / f"visual_genome_{name}.json").write_text(json.dumps(entries), "utf-8")
    for k in range(4):
        Image.frombytes("RGB", (20, 16), random.Random(k).randbytes(960)).save(root / "images" / f"{k}.jpg")
    return str(root)


def write_captions(root: Path, name: str = "coco_karpathy_test.json", captions: Any = (CAPTION, "a cat")) -> str:
    """A Karpathy file of two images; the path."""
    (root / "val2014").mkdir(parents=True, exist_ok=True)
    entries = [{"image": f"val2014/{k}.jpg", "caption": list(captions)} for k in range(2)]
    (root / name).write_text(json.dumps(entries), "utf-8")
    for k in range(2):
        Image.frombytes("RGB", (20, 16), random.Random(k).randbytes(960)).save(root / "val2014" / f"{k}.jpg")
    return str(root)


def refused(path: str | Path, **settings: Any) -> str:
    with pytest.raises(InputError) as error:
        open_aro(path=str(path), **settings)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"aro:{path}")
    return str(error.value)


def test_relations_are_cut_out_of_their_images(tmp_path: Path) -> None:
    source = open_source(f"aro:{write(tmp_path)}?part=relation")
    assert len(source) == 9
    sample = source[7]
    assert (sample.id, sample.group) == ("relation/7", "under")
    assert sample.captions == ("the cat 7 is under the dog",)
    assert sample.negatives == ("the dog is under the cat 7",)
    with Image.open(tmp_path / "images" / "3.jpg") as whole:
        assert sample.image.size == (10, 9)
        assert sample.image.tobytes() == whole.convert("RGB").crop((2, 2, 12, 11)).tobytes()


def test_boxes_at_the_edge(tmp_path: Path) -> None:
    """What lies outside is black, as Pillow crops; a box without any pixel, or with far too many, is a bad sample."""
    path = write(tmp_path)
    boxes = [(15, 10, 10, 10), (20, 0, 5, 5), (0, 0, 0, 5), (-9, -9, 9, 9), (0, 0, 10**6, 10**6)]
    entries = [relation(0) | dict(zip(("bbox_x", "bbox_y", "bbox_w", "bbox_h"), box, strict=True)) for box in boxes]
    (tmp_path / "visual_genome_relation.json").write_text(json.dumps(entries), "utf-8")
    source = open_aro(path=path)
    found, images = source[0].image, Image.open(tmp_path / "images" / "0.jpg").convert("RGB")
    assert found.size == (10, 10) and found.getpixel((9, 9)) == (0, 0, 0)
    assert found.getpixel((1, 2)) == images.getpixel((16, 12))
    for k in (1, 2, 3):
        with pytest.raises(BadSample, match="holds nothing of an image of 20 x 16"):
            source[k]
    with pytest.raises(BadSample, match="exceeds 100000000 pixels"):
        source[4]


def test_symmetric_relations_count_in_accuracy_and_not_in_macro(tmp_path: Path) -> None:
    assert len(SYMMETRIC) == 157 and {"next to", "in between", "wrapped in", "adjusting"} <= SYMMETRIC
    assert not SYMMETRIC & {"riding", "under", "on", "to the left of"} and all(n == n.strip() for n in SYMMETRIC)
    found = evaluate(tiny_clip(), ["hard-negatives"], default_data=f"aro:{write(tmp_path, relations=60)}")
    one = found["evaluation/hard-negatives"]
    means = [one.metrics[f"group/{name}"] for name in RELATIONS]
    assert one.metrics["macro"] == pytest.approx((means[0] + means[1]) / 2)
    assert one.metrics["accuracy"] == pytest.approx(sum(means) / 3) and one.counts["accuracy"][1] == 60
    for name, statistic in one.statistics.items():
        assert statistics.value(statistic, one.samples) == pytest.approx(one.metrics[name])


def test_rare_attributes_count_in_accuracy_and_not_in_macro(tmp_path: Path) -> None:
    found = evaluate(tiny_clip(), ["hard-negatives"], default_data=f"aro:{write(tmp_path)}?part=attribution")
    one = found["evaluation/hard-negatives"]
    assert one.metrics["macro"] == one.metrics["group/red_small"] and "group/blue_large" not in one.metrics
    assert one.counts["accuracy"][1] == 30 and one.counts["group/red_small"][1] == 25


def test_official_test_cases(tmp_path: Path) -> None:
    path = write_captions(tmp_path)
    cases = [
        {"image": "val2014/0.jpg", "caption_options": ["a b c", "c b a", "a b c", "b a c", "c b a"]},
        {"image": "val2014/1.jpg", "caption_options": ["a cat, here", "a cat , here"]},
        {"image": "val2014/1.jpg", "caption_options": ["a cat", "cat a"]},
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases), "utf-8")
    source = open_source(f"aro:{path}?part=coco-order&perturbed={tmp_path / 'cases.json'}")
    assert [source[k].id for k in range(len(source))] == ["coco-order/0", "coco-order/2"]
    assert source[0].captions == ("a b c",) and source[0].negatives == ("c b a", "b a c")
    assert source[1].group == "coco-order" and source[1].image.size == (20, 16)


@pytest.mark.parametrize(
    ("part", "file"), [("coco-order", "coco_karpathy_val.json"), ("flickr-order", "flickr30k_val.json")]
)
def test_trigrams_need_no_tagger(tmp_path: Path, part: Any, file: str) -> None:
    path = write_captions(tmp_path, file)
    source = open_aro(path=path, part=part, split="val", order="trigrams")
    samples = [source[k] for k in range(len(source))]
    assert [s.id for s in samples if "cats" in s.captions[0]] == [f"{part}/0", f"{part}/2"]
    for sample in samples:
        words = sorted(sample.captions[0].replace(",", " ,").split())
        assert all(sorted(negative.split()) == words for negative in sample.negatives)
        assert sample.captions[0] == sample.captions[0].lower() and sample.captions[0] not in sample.negatives
    again = open_aro(path=path, part=part, split="val", order="trigrams")
    assert [again[k].negatives for k in range(len(again))] == [s.negatives for s in samples]
    other = open_aro(path=path, part=part, split="val", order="trigrams", seed=1)
    assert other.fingerprint != source.fingerprint == again.fingerprint
    entries = json.loads((tmp_path / file).read_text("utf-8"))
    (tmp_path / file).write_text(json.dumps(entries[::-1]), "utf-8")
    turned = open_aro(path=path, part=part, split="val", order="trigrams")
    assert {row.image: row.negatives for row in turned.rows if "cats" in row.caption} == {
        row.image: row.negatives for row in source.rows if "cats" in row.caption
    }


def test_shuffles_move_what_they_say() -> None:
    seen: set[tuple[str, str]] = set()
    for seed in range(300):
        within, moved = (
            text.split() for text in shuffled_trigrams("one two three four five six seven", random.Random(seed))
        )
        assert [sorted(within[k : k + 3]) for k in (0, 3, 6)] == [
            sorted(three) for three in (["one", "two", "three"], ["four", "five", "six"], ["seven"])
        ]
        text = " ".join(moved)
        assert "one two three" in text and "four five six" in text and len(moved) == 7
        seen.add((" ".join(within), text))
    assert len({within for within, _ in seen}) == 36 and len({moved for _, moved in seen}) == 6


def test_captions_are_cleaned() -> None:
    assert clean('  The "dog" (it\'s red): runs; *fast*.\n') == "the dog it's red runs fast"
    assert clean(" ".join(f"w{k}" for k in range(40))) == " ".join(f"w{k}" for k in range(30))


def test_every_mistake_is_one_line(tmp_path: Path) -> None:
    assert "no such folder" in refused(tmp_path / "nowhere")
    path = write(tmp_path / "a")
    file = tmp_path / "a" / "visual_genome_relation.json"

    def changed(**values: Any) -> str:
        file.write_text(json.dumps([relation(0), relation(1) | values]), "utf-8")
        return refused(path)

    for key in ("image_path", "true_caption", "false_caption", "relation_name"):
        assert f"visual_genome_relation.json entry 1 has no text {key!r} but None" in changed(**{key: None})
    for value in (None, "3", True, float("nan"), float("inf")):
        assert "entry 1 has no box bbox_x, bbox_y, bbox_w, bbox_h" in changed(bbox_w=value)
    for text, line in {
        "[]": "no list of objects",
        "{}": "no list of objects",
        "[1]": "no list",
        "[": "no JSON",
    }.items():
        file.write_text(text, "utf-8")
        assert line in refused(path)
    pairs = tmp_path / "a" / "visual_genome_attribution.json"
    for names in (None, [], ["red"], "red_small", ["red", 3]):
        pairs.write_text(json.dumps([attribution(0) | {"attributes": names}]), "utf-8")
        assert "entry 0 has no pair of attributes" in refused(path, part="attribution")
    assert "perturbed belongs to coco-order and flickr-order" in refused(path, perturbed="x.json")
    file.unlink()
    assert "visual_genome_relation.json is missing" in refused(path)
    write(tmp_path / "a")
    (tmp_path / "a" / "images").rename(tmp_path / "a" / "pictures")
    assert "no folder images beside visual_genome_relation.json" in refused(path)


def test_every_mistake_about_order_is_one_line(tmp_path: Path) -> None:
    path, cases = write_captions(tmp_path), tmp_path / "cases.json"
    line = refused(path, part="coco-order")
    assert "spaCy's tagger" in line and "perturbed=FILE.json" in line and "order=trigrams" in line
    assert "no such folder" in refused(tmp_path / "nowhere", part="coco-order", order="trigrams")
    assert "flickr30k_test.json is missing" in refused(path, part="flickr-order", order="trigrams")
    assert "cases.json is missing" in refused(path, part="coco-order", perturbed=str(cases))
    assert "leave out perturbed" in refused(path, part="coco-order", order="trigrams", perturbed=str(cases))
    for options in (None, [], ["a"], ["a", 3], "ab", ["a", ""]):
        cases.write_text(json.dumps([{"image": "val2014/0.jpg", "caption_options": options}]), "utf-8")
        assert "cases.json entry 0 has no caption_options" in refused(path, part="coco-order", perturbed=str(cases))
    cases.write_text(json.dumps([{"caption_options": ["a", "b"]}]), "utf-8")
    assert "cases.json entry 0 has no text 'image'" in refused(path, part="coco-order", perturbed=str(cases))
    for captions in ([], [3], None):
        entry = {"image": "val2014/0.jpg", "caption": captions}
        (tmp_path / "coco_karpathy_test.json").write_text(json.dumps([entry]), "utf-8")
        assert "entry 0 has no list of captions" in refused(path, part="coco-order", order="trigrams")
    (tmp_path / "coco_karpathy_test.json").write_text(json.dumps([{"caption": ["a"]}]), "utf-8")
    assert "entry 0 has no text 'image'" in refused(path, part="coco-order", order="trigrams")
