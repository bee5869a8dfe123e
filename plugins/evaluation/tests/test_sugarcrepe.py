"""``sugarcrepe:DIR``: seven files, COCO's images, and one line for everything that is wrong with them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from clipgraft.data.base import BadSample, Source
from clipgraft.errors import InputError
from clipgraft.evaluation import evaluate
from clipgraft.testing.tiny import tiny_clip
from clipgraft_evaluation.sugarcrepe import PARTS, open_sugarcrepe


def entries(kind: str, n: int) -> dict[str, dict[str, str]]:
    return {
        str(k): {
            "filename": f"{k:012d}.jpg",
            "caption": f"A red cat {k} left of a dog. ",
            "negative_caption": f"A blue {kind} cat {k} left of a dog.",
        }
        for k in range(n)
    }


def write(root: Path, *, inside: str = "", images: str = "val2017") -> str:
    """Two to eight tests of each kind that share eight images; the path."""
    for folder in (root / inside, root / images):
        folder.mkdir(parents=True, exist_ok=True)
    for n, kind in enumerate(PARTS, 2):
        (root / inside / f"{kind}.json").write_text(json.dumps(entries(kind, n), indent=4), "utf-8")
    for k in range(8):
        image = Image.frombytes("RGB", (20, 16), random.Random(k).randbytes(960))
        image.save(root / images / f"{k:012d}.jpg")
    return str(root)


def refused(path: str | Path, **settings: Any) -> str:
    with pytest.raises(InputError) as error:
        open_sugarcrepe(path=str(path), **settings)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"sugarcrepe:{path}")
    return str(error.value)


@pytest.mark.parametrize("inside", ["", "data"])
@pytest.mark.parametrize("images", ["val2017", "images/val2017", "data/coco/images/val2017"])
def test_the_published_layout(tmp_path: Path, inside: str, images: str) -> None:
    source = open_sugarcrepe(path=write(tmp_path, inside=inside, images=images))
    assert isinstance(source, Source) and len(source) == sum(range(2, 9))
    sample = source[3]
    assert (sample.id, sample.group) == ("add_obj/1", "add_obj")
    assert sample.captions == ("A red cat 1 left of a dog.",)
    assert sample.negatives == ("A blue add_obj cat 1 left of a dog.",)
    with Image.open(tmp_path / images / "000000000001.jpg") as expected:
        assert sample.image.tobytes() == expected.tobytes()
    groups = [source[k].group for k in range(len(source))]
    assert {group: groups.count(group) for group in groups} == dict(zip(PARTS, range(2, 9), strict=True))
    assert len({source[k].id for k in range(len(source))}) == len(source)


def test_one_kind_and_images_elsewhere(tmp_path: Path) -> None:
    path = write(tmp_path / "texts", images="../coco")
    source = open_sugarcrepe(path=path, part="swap_att", images=str(tmp_path / "coco"))
    assert len(source) == 7 and source[6].id == "swap_att/6"
    (tmp_path / "texts" / "add_att.json").unlink()
    assert open_sugarcrepe(path=path, part="swap_att", images=str(tmp_path / "coco")).fingerprint == source.fingerprint


def test_every_kind_is_a_group(tmp_path: Path) -> None:
    ref = f"sugarcrepe:{write(tmp_path)}"
    found = evaluate(tiny_clip(), ["hard-negatives"], default_data=ref)["evaluation/hard-negatives"]
    assert found.metrics.keys() == {"accuracy", "ties", "macro", *(f"group/{kind}" for kind in PARTS)}
    assert found.metrics["macro"] == pytest.approx(sum(found.metrics[f"group/{kind}"] for kind in PARTS) / 7)
    part = evaluate(tiny_clip(), ["hard-negatives"], default_data=f"{ref}?part=swap_obj")
    assert part["evaluation/hard-negatives"].metrics["accuracy"] == found.metrics["group/swap_obj"]
    assert found.intervals.keys() == found.metrics.keys()


def test_a_missing_image_is_a_bad_sample(tmp_path: Path) -> None:
    path = write(tmp_path)
    (tmp_path / "val2017" / f"{7:012d}.jpg").unlink()
    source = open_sugarcrepe(path=path, part="swap_obj")
    with pytest.raises(BadSample, match=r"^swap_obj/7: 000000000007\.jpg: missing file$"):
        source[7]


def test_every_mistake_is_one_line(tmp_path: Path) -> None:
    assert "no such folder" in refused(tmp_path / "nowhere")
    path = write(tmp_path)
    file = tmp_path / "add_obj.json"
    for column in ("filename", "caption", "negative_caption"):
        for value in (None, "  ", 3):
            table = entries("add_obj", 3)
            table["2"] |= {column: value}  # type: ignore[dict-item]
            file.write_text(json.dumps(table), "utf-8")
            assert f"add_obj.json entry 2 has no text {column!r}" in refused(path)
    for text in ("{}", "[]", "3", '{"0": "a cat"}', "null"):
        file.write_text(text, "utf-8")
        assert "add_obj.json holds no list of objects" in refused(path)
    for text in ("", '{"0": ', "[" * 100_000):
        file.write_text(text, "utf-8")
        assert "add_obj.json is no JSON" in refused(path)
    file.write_bytes(b'{"\xff": 1}')
    assert "not UTF-8 at byte 2" in refused(path)
    file.unlink()
    assert "add_obj.json is missing" in refused(path)
    (tmp_path / "add_att.json").unlink()
    assert "add_att.json is missing" in refused(path)
    write(tmp_path)
    (tmp_path / "val2017").rename(tmp_path / "train2017")
    assert "no images in val2017, images/val2017, coco/images/val2017; unpack COCO's val2017 there" in refused(path)
    assert "elsewhere is no folder" in refused(path, images="elsewhere")
