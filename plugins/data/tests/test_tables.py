"""Manifests, Karpathy and COCO files, Hugging Face datasets and mixtures, written in their real formats."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clipgraft.data import open_source
from clipgraft.data.base import BadSample, Source
from clipgraft.data.sampling import epoch_order, plan
from clipgraft.errors import InputError
from clipgraft_data.mix import apportioned


def png(value: int, size: tuple[int, int] = (12, 10)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (value, 0, 0)).save(out, "PNG")
    return out.getvalue()


def pictures(folder: Path, n: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        (folder / f"{i}.png").write_bytes(png(i))


def jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"table:{path}"


def parquet(path: Path, columns: Mapping[str, Any]) -> str:
    pq.write_table(pa.table(dict(columns)), path)
    return f"table:{path}"


def line(ref: str) -> str:
    with pytest.raises(InputError) as caught:
        open_source(ref)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- table: ------------------------------------------------------------------------------------------------------------


def test_a_manifest_says_the_same_in_both_formats(tmp_path: Path) -> None:
    pictures(tmp_path / "img", 3)
    columns = {
        "image": ["img/0.png", "img/1.png", "img/0.png", "img/2.png"],
        "captions": [["a", " b "], ["c"], ["d"], ["e"]],
        "caption_weights": [[0.75, 0.25], None, [2.0], None],
        "label": [10, 9, None, 10],
        "negatives": [["not a"], None, [], None],
        "group": ["g", None, "g", ""],
        "url": ["ignored"] * 4,
    }
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    for ref in (jsonl(tmp_path / "t.jsonl", rows), parquet(tmp_path / "t.parquet", columns)):
        source = open_source(ref)
        assert isinstance(source, Source) and [*source.classes] == ["9", "10"]
        first, second, third = (source[i] for i in range(3))
        assert (first.id, first.captions, first.caption_weights) == ("img/0.png", ("a", "b", "d"), (0.75, 0.25, 2.0))
        assert (first.negatives, first.group, first.label) == (("not a",), "g", 1)
        assert (second.captions, second.caption_weights, second.label, second.group) == (("c",), (), 0, "")
        assert np.asarray(third.image)[0, 0, 0] == 2
        assert source.content(2) == png(2) and source.entry(0).group == "g"


def test_the_fingerprint_covers_every_column_that_counts(tmp_path: Path) -> None:
    pictures(tmp_path, 1)
    row = {"image": "0.png", "captions": ["a", "b"]}
    more = [{}, {"caption_weights": [1, 2]}, {"negatives": ["x"]}, {"group": "g"}, {"label": "cat"}]
    prints = {open_source(jsonl(tmp_path / "t.jsonl", [row | extra])).fingerprint for extra in more}
    assert len(prints) == 5


def test_several_caption_columns_share_the_draws(tmp_path: Path) -> None:
    pictures(tmp_path, 1)
    ref = jsonl(tmp_path / "t.jsonl", [{"image": "0.png", "raw": "r", "synthetic": ["s", "t"]}])
    sample = open_source(f"{ref}?captions=raw:1,synthetic:3")[0]
    assert sample.captions == ("r", "s", "t") and sample.caption_weights == (1.0, 1.5, 1.5)
    assert "expected the columns image and other" in line(f"{ref}?captions=other")


def test_empty_cells_are_bad_samples_as_in_csv(tmp_path: Path) -> None:
    pictures(tmp_path, 4)
    rows: list[dict[str, Any]] = [
        {"image": f"{i}.png", "caption": c} for i, c in enumerate([None, "", float("nan"), "x"])
    ]
    source = open_source(jsonl(tmp_path / "t.jsonl", [*rows, {"image": "9.png", "caption": "gone"}]))
    for i in range(3):
        with pytest.raises(BadSample, match="empty caption"):
            source[i]
    assert source[3].captions == ("x",)
    with pytest.raises(BadSample, match="missing file"):
        source[4]


def test_images_may_be_inside_a_parquet_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    plain = {"image": [png(3), png(4), b"<html>", None], "caption": ["c", "d", "e", "f"], "label": ["x", "y", "x", "x"]}
    structs = {**plain, "image": [None if b is None else {"bytes": b, "path": None} for b in plain["image"]]}
    for k, columns in enumerate((plain, structs)):
        source = open_source(parquet(tmp_path / f"{k}.parquet", columns))
        assert [*source.classes] == ["x", "y"] and [source[i].captions for i in range(2)] == [("c",), ("d",)]
        assert np.asarray(source[1].image)[0, 0, 0] == 4 and source[1].id == "1" and source.content(0) == png(3)
        with pytest.raises(BadSample, match="2: not an image"):
            source[2]
        with pytest.raises(BadSample, match="3: missing image"):
            source[3]


def test_wrong_manifests_are_one_clear_line(tmp_path: Path) -> None:
    pictures(tmp_path, 2)
    t = tmp_path / "t.jsonl"
    weights = {"image": "0.png", "captions": ["a", "b"]}
    for rows, expected in (
        ([{"caption": "a"}], "expected the columns image and caption, found caption"),
        ([{"image": "0.png"}], "expected the columns image and caption (or label), found image"),
        ([{"image": "0.png", "caption": "a"}, {"caption": "b"}], "line 2: a caption without an image"),
        ([weights | {"caption_weights": [1]}], "line 1: 1 caption_weights for 2 captions"),
        ([weights | {"caption_weights": [0, 0]}], "must be finite, none negative and not all zero"),
        ([weights | {"caption_weights": ["x", 1]}], "caption_weights holds 'x'; expected numbers"),
        ([weights | {"captions": [3]}], "line 1: captions holds a int; expected text"),
        ([{"image": "0.png", "label": "a"}, {"image": "0.png", "label": "b"}], "0.png has two labels, 'a' and 'b'"),
        ([{"image": "0.png", "label": "a"}, {"image": "1.png", "label": None}], "1.png has no label but others"),
    ):
        assert expected in line(jsonl(t, rows))
    for content, expected in (
        ('{"image": "0.png", "caption": "trè'.encode("latin-1"), "not UTF-8 at byte"),
        (b'{"image": "0.png", "caption": "a"}\n{"image"', "line 2: no JSON"),
        (b"[1]\n", "line 1: expected an object"),
        (b"", "found none"),
        (b"[" * 100_000, "no JSON"),
    ):
        t.write_bytes(content)
        assert expected in line(f"table:{t}")
    (tmp_path / "t.parquet").write_bytes(b"no parquet")
    assert "no Parquet file" in line(f"table:{tmp_path}/t.parquet")
    assert "column image is int64" in line(parquet(tmp_path / "i.parquet", {"image": [1], "caption": ["a"]}))
    assert "no such file" in line("table:nowhere.jsonl")
    (tmp_path / "t.txt").write_text("")
    assert "ends in .parquet or .jsonl" in line(f"table:{tmp_path}/t.txt")


def test_a_manifest_cannot_reach_outside_its_folder(tmp_path: Path) -> None:
    pictures(tmp_path, 1)
    (tmp_path / "data").mkdir()
    source = open_source(jsonl(tmp_path / "data" / "t.jsonl", [{"image": "../0.png", "caption": "a"}]))
    for read in (source.__getitem__, source.content):
        with pytest.raises(BadSample, match="leaves the data folder"):
            read(0)


# -- karpathy: and coco: -----------------------------------------------------------------------------------------------


def test_karpathy_splits_of_both_layouts(tmp_path: Path) -> None:
    pictures(tmp_path / "images" / "val2014", 4)
    pictures(tmp_path / "flat", 4)
    splits = ("train", "test", "test", "restval")
    rows = [
        {
            "filepath": "val2014",
            "filename": f"{i}.png",
            "split": s,
            "sentences": [{"raw": f"{i} {k}"} for k in range(5)],
        }
        for i, s in enumerate(splits)
    ]
    (tmp_path / "k.json").write_text(json.dumps({"images": rows, "dataset": "coco"}))
    source = open_source(f"karpathy:{tmp_path}/k.json?images={tmp_path}/images")
    assert [source[i].id for i in range(2)] == ["val2014/1.png", "val2014/2.png"] and len(source) == 2
    assert source[1].captions == tuple(f"2 {k}" for k in range(5))
    flat = open_source(f"karpathy:{tmp_path}/k.json?images={tmp_path}/flat&split=train+restval")
    assert [flat[i].id for i in range(2)] == ["0.png", "3.png"]
    unknown = line(f"karpathy:{tmp_path}/k.json?images={tmp_path}/flat&split=tets")
    assert "unknown split" in unknown and "did you mean test" in unknown
    assert "no such folder" in line(f"karpathy:{tmp_path}/k.json?images={tmp_path}/no")
    (tmp_path / "k.json").write_text("{}")
    assert "a list of objects under 'images'" in line(f"karpathy:{tmp_path}/k.json?images={tmp_path}/flat")


def test_coco_captions(tmp_path: Path) -> None:
    pictures(tmp_path / "val", 3)
    document: dict[str, Any] = {
        "images": [{"id": 10 + i, "file_name": f"{i}.png"} for i in range(3)],
        "annotations": [{"id": k, "image_id": 10 + k % 2, "caption": f"said {k}\n"} for k in range(4)],
    }
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(document))
    source = open_source(f"coco:{path}?images={tmp_path}/val")
    assert [source[i].captions for i in range(2)] == [("said 0", "said 2"), ("said 1", "said 3")]
    with pytest.raises(BadSample, match=r"2\.png: empty caption"):
        source[2]
    path.write_text(json.dumps({**document, "annotations": [{"image_id": 99, "caption": "x"}]}))
    assert "a caption without an image: image_id 99" in line(f"coco:{path}?images={tmp_path}/val")
    path.write_text(json.dumps({**document, "annotations": [{"image_id": 10, "bbox": []}]}))
    assert "use captions_*.json" in line(f"coco:{path}?images={tmp_path}/val")
    path.write_text(json.dumps({"images": [{"file_name": "0.png"}], "annotations": [{"caption": "x"}]}))
    assert "an image without an id" in line(f"coco:{path}?images={tmp_path}/val")
    path.write_text("{")
    assert "no JSON" in line(f"coco:{path}?images={tmp_path}/val")


# -- mix: --------------------------------------------------------------------------------------------------------------


def mixture(path: Path, parts: Sequence[Mapping[str, Any]]) -> str:
    path.write_text(json.dumps(parts))  # JSON is YAML
    return f"mix:{path}"


def test_a_mix_holds_every_sample_and_plans_its_shares(tmp_path: Path) -> None:
    for name, n in (("a", 3), ("b", 12)):
        for k in ("cat", "dog"):
            pictures(tmp_path / name / k, n)
    parts = [{"from": f"folder:{tmp_path}/a", "weight": 2}, {"from": f"folder:{tmp_path}/b", "weight": 1}]
    source = open_source(mixture(tmp_path / "m.yaml", parts))
    ids = [source[i].id for i in range(len(source))]
    assert len(source) == 30 == len(set(ids)) and ids[0] == "0/cat/0.png" and ids[6] == "1/cat/0.png"
    assert [source.entry(i).id for i in range(30)] == ids and source.content(29) == png(9)
    assert [*source.classes] == ["cat", "dog"] and source[29].label == 1
    shown = set[int]()
    for epoch in range(40):
        order = epoch_order(plan(source), seed=0, epoch=epoch).tolist()
        often = Counter(order)
        assert sum(often[i] for i in range(6)) == 20 and {often[i] for i in range(6)} == {3, 4}
        assert sum(often[i] for i in range(6, 30)) == 10 and max(often[i] for i in range(6, 30)) == 1
        shown |= set(order)
    assert shown == set(range(30))
    shorter = open_source(mixture(tmp_path / "m.yaml", parts) + "?size=9")
    assert [count for _, count in shorter.quotas] == [6, 3] and shorter.fingerprint != source.fingerprint


def test_classes_of_a_mix_need_all_parts_to_agree(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        pictures(tmp_path / "a" / name, 1)
    pictures(tmp_path / "b" / "owl", 1)
    source = open_source(mixture(tmp_path / "m.yaml", [{"from": f"folder:{tmp_path}/{n}"} for n in "ab"]))
    assert not source.classes and all(source[i].label is None for i in range(3))


def test_apportioned_adds_up_and_rounds() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        weights, size = rng.uniform(0.1, 5, rng.integers(1, 6)), int(rng.integers(1, 500))
        counts = apportioned(weights.tolist(), size)
        exact = weights / weights.sum() * size
        assert sum(counts) == size and np.abs(np.array(counts) - exact).max() < 1


def test_wrong_mixes_are_one_clear_line(tmp_path: Path) -> None:
    pictures(tmp_path / "a", 1)
    m = tmp_path / "m.yaml"
    good = {"from": f"folder:{tmp_path}/a"}
    for parts, expected in (
        ([], "a mix of nothing"),
        (["folder:x"], "entry 0 is 'folder:x'"),
        ([{"weight": 1}], "entry 0"),
        ([good | {"weight": 0}], "weight"),
        ([good, {"from": "folder:nowhere"}], "no such folder"),
        ([{"from": f"mix:{m}"}], "is a mix itself"),
    ):
        assert expected in line(mixture(m, parts))  # type: ignore[arg-type]
    assert "No such file" in line(f"mix:{tmp_path}/no.yaml")


# -- hf: ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


def small(datasets: Any, n: int = 4) -> Any:
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
        }
    )
    rows = {"image": [{"bytes": png(i), "path": None} for i in range(n)], "text": [f"t{i}" for i in range(n)]}
    return datasets.Dataset.from_dict({**rows, "label": [i % 2 for i in range(n)]}, features=features)


def test_saved_datasets_open_by_split(tmp_path: Path, datasets: Any) -> None:
    small(datasets).save_to_disk(tmp_path / "one")
    source = open_source(f"hf:{tmp_path}/one")
    assert isinstance(source, Source) and [*source.classes] == ["cat", "dog"]
    sample = source[3]
    assert (sample.id, sample.captions, sample.label) == ("3", ("t3",), 1)
    assert np.asarray(sample.image)[0, 0, 0] == 3 and source.content(2) == png(2)
    assert source.entry(1) == open_source(f"hf:{tmp_path}/one").entry(1)
    assert open_source(f"hf:{tmp_path}/one").fingerprint == source.fingerprint
    assert len(open_source(f"hf:{tmp_path}/one?take=2")) == 2
    datasets.DatasetDict(train=small(datasets), test=small(datasets, 2)).save_to_disk(tmp_path / "two")
    assert len(open_source(f"hf:{tmp_path}/two?split=test")) == 2
    assert "split None unknown; it has train, test" in line(f"hf:{tmp_path}/two")
    assert "split val unknown; it has train, test" in line(f"hf:{tmp_path}/two?split=val")
    assert "no column 'picture'; it has image, text, label" in line(f"hf:{tmp_path}/one?image=picture")


def test_parquet_files_open_whole_or_as_the_start_of_a_stream(tmp_path: Path, datasets: Any) -> None:
    path = tmp_path / "p.parquet"
    small(datasets).to_parquet(str(path))
    whole, taken = open_source(f"hf:{path}"), open_source(f"hf:{path}?take=3&streaming=true")
    assert (len(whole), len(taken)) == (4, 3)
    for i in range(3):
        a, b = whole[i], taken[i]
        assert (a.id, a.captions, a.label) == (b.id, b.captions, b.label) and taken.content(i) == png(i)
        assert whole.entry(i) == taken.entry(i)
    assert [*taken.classes] == ["cat", "dog"] and taken.fingerprint != whole.fingerprint
    assert "write ?take=N" in line(f"hf:{path}?streaming=true")


def test_columns_are_chosen_and_classes_found(tmp_path: Path, datasets: Any) -> None:
    rows = {"pic": [png(i) for i in range(3)], "said": [["a", "b"], ["c"], ["d"]], "kind": ["x", "y", "x"]}
    datasets.Dataset.from_dict({**rows, "key": ["k0", "k1", "k2"]}).save_to_disk(tmp_path / "d")
    source = open_source(f"hf:{tmp_path}/d?image=pic&caption=said&label=kind&id=key")
    assert [source[i].id for i in range(3)] == ["k0", "k1", "k2"] and source[0].captions == ("a", "b")
    assert [*source.classes] == ["x", "y"] and [source[i].label for i in range(3)] == [0, 1, 0]
    assert "column kind repeats itself" in line(f"hf:{tmp_path}/d?image=pic&caption=said&id=kind")


def test_paths_of_a_dataset_stay_inside_its_folder(tmp_path: Path, datasets: Any) -> None:
    (tmp_path / "secret.png").write_bytes(png(1))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "open.png").write_bytes(png(2))
    paths = [str(tmp_path / "secret.png"), str(tmp_path / "data" / "open.png"), "/etc/passwd"]
    table = pa.table({"image": [{"bytes": None, "path": path} for path in paths], "text": ["a", "b", "c"]})
    pq.write_table(table, tmp_path / "data" / "p.parquet")
    source = open_source(f"hf:{tmp_path}/data/p.parquet")
    assert np.asarray(source[1].image)[0, 0, 0] == 2
    for i in (0, 2):
        with pytest.raises(BadSample, match="leaves the data folder"):
            source[i]


def test_what_cannot_be_had_offline_is_one_clear_line(tmp_path: Path, datasets: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "can't be loaded" in line("hf:nobody/nothing?split=train")
    assert "no such file or folder" in line("hf:./nowhere")
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    assert "can't be loaded" in line(f"hf:{tmp_path}/x.parquet")
    (tmp_path / "x.tar").write_bytes(b"")
    assert "ends in .parquet or .arrow" in line(f"hf:{tmp_path}/x.tar")


def test_code_beside_a_dataset_does_not_run(tmp_path: Path, datasets: Any) -> None:
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    line(f"hf:{folder}")
    assert not (tmp_path / "ran").exists()
