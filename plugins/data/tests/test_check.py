"""The data doctor: every kind of fault in real files, near duplicates against all pairs, and the command line."""

from __future__ import annotations

import io
import json
import shutil
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from clipgraft.data import open_source
from clipgraft.data.exclude import exclude
from clipgraft.testing.tiny import TinyTokenizer
from clipgraft_data.check import KINDS, check
from clipgraft_data.commands import app
from clipgraft_data.duplicates import COLOUR, near_duplicates, near_pairs
from clipgraft_data.inspection import longer_than_context, perceptual_hash


def scene(seed: int, size: int = 64) -> Image.Image:
    """A random picture with structure, so that its hash means something."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize(
        (size, size), Image.Resampling.BICUBIC
    )
    box = sorted(rng.integers(0, size, 2).tolist())
    ImageDraw.Draw(image).rectangle(
        (box[0], box[0], box[1] + 1, box[1] + 1), fill=tuple(rng.integers(0, 256, 3).tolist())
    )
    return image


def bomb(path: Path, side: int = 20000) -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    data = b"IDAT" + zlib.compress(bytes(1000))
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, data)]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def faulty(folder: Path) -> str:
    """A table with one sample of each fault and eleven good ones that share a caption."""
    folder.mkdir()
    rows = ["image,caption"]

    def row(name: str, caption: str = "a caption of its own ") -> None:
        rows.append(f"{name},{caption + name if caption.endswith(' ') else caption}")

    for i in range(11):
        scene(i).save(folder / f"good{i}.png")
        row(f"good{i}.png", "the same for all")
    row("gone.png")
    (folder / "page.jpg").write_text("<html>")
    row("page.jpg")
    bomb(folder / "bomb.png")
    row("bomb.png")
    scene(20, 31).save(folder / "tiny.png")
    row("tiny.png")
    shutil.copy(folder / "good3.png", folder / "copy.png")
    row("copy.png")
    scene(4).save(folder / "near.jpg", quality=85)
    row("near.jpg")
    scene(21).save(folder / "lie.jpg", "PNG")
    row("lie.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    scene(22).save(folder / "turned.jpg", exif=exif)
    row("turned.jpg")
    for name, caption in (("silent.png", ""), ("long.png", "word " * 78 + "end")):
        scene(23 + len(caption)).save(folder / name)
        row(name, caption)
    (folder / "t.csv").write_text("\n".join(rows))
    return f"csv:{folder / 't.csv'}"


EXPECTED = {
    "missing-image": ["gone.png"],
    "unreadable": ["page.jpg"],
    "bomb": ["bomb.png"],
    "tiny": ["tiny.png"],
    "exact-duplicate": ["copy.png"],
    "near-duplicate": ["near.jpg"],
    "empty-caption": ["silent.png"],
    "long-caption": ["long.png"],
    "repeated-caption": ["good0.png"],
    "wrong-extension": ["lie.jpg"],
    "exif-rotated": ["turned.jpg"],
}


@pytest.mark.parametrize("workers", [0, 2])
def test_every_fault_is_found_and_nothing_else(tmp_path: Path, workers: int) -> None:
    report = check(open_source(faulty(tmp_path / "d")), workers=workers)
    assert {kind: [name for name, _ in found] for kind, found in report.found.items()} == EXPECTED
    assert report.found["exact-duplicate"] == [("copy.png", "the same as good3.png")]
    assert report.found["near-duplicate"] == [("near.jpg", "looks like good4.png")]
    assert report.found["repeated-caption"] == [("good0.png", "11 images: the same for all")]
    assert report.found["wrong-extension"] == [("lie.jpg", "PNG in a file called .jpg")]
    out = {"gone.png", "page.jpg", "bomb.png", "tiny.png", "copy.png", "near.jpg", "silent.png"}
    assert report.quarantine().keys() == out


def test_the_quarantine_list_is_what_a_run_leaves_out(tmp_path: Path) -> None:
    ref = faulty(tmp_path / "d")
    found = CliRunner().invoke(
        app, ["check", ref, "--quarantine", str(tmp_path / "q"), "--out", str(tmp_path / "r.json")]
    )
    assert found.exit_code == 0 and "near-duplicate" in found.stdout
    lines = dict(line.split("\t") for line in (tmp_path / "q").read_text().splitlines())
    assert lines["copy.png"] == "exact-duplicate: the same as good3.png" and len(lines) == 7
    left = exclude(open_source(ref), tmp_path / "q")
    again = check(left)
    assert again.samples == 21 - 7 and again.found.keys() == {
        "long-caption",
        "repeated-caption",
        "wrong-extension",
        "exif-rotated",
    }
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["samples"] == 21 and report["quarantined"] == 7
    assert report["findings"]["tiny"] == {"count": 1, "examples": [{"id": "tiny.png", "reason": "31 x 31 pixels"}]}


def test_json_is_alone_on_stdout_and_strict_decides_the_exit(tmp_path: Path) -> None:
    ref = faulty(tmp_path / "d")
    found = CliRunner().invoke(app, ["check", ref, "--json", "--strict"])
    assert found.exit_code == 1 and set(json.loads(found.stdout)["findings"]) == EXPECTED.keys()
    scene(1).save(tmp_path / "a.png")
    (tmp_path / "ok.csv").write_text("image,caption\na.png,one")
    found = CliRunner().invoke(app, ["check", f"csv:{tmp_path / 'ok.csv'}", "--strict"])
    assert found.exit_code == 0 and "nothing found" in found.stdout


# -- other schemes -----------------------------------------------------------------------------------------------------


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def test_shards_folders_and_datasets_are_checked_alike(tmp_path: Path, monkeypatch: Any) -> None:
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    pictures = [png(scene(i)) for i in range(4)] + [png(scene(2)), b"broken"]
    folder = tmp_path / "f"
    for i, content in enumerate(pictures):
        (folder / ("cat" if i else "dog")).mkdir(parents=True, exist_ok=True)
        (folder / ("cat" if i else "dog") / f"{i}.png").write_bytes(content)
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for i, content in enumerate(pictures):
            for name, data in ((f"{i}.png", content), (f"{i}.json", json.dumps({"caption": f"c{i}"}).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        tar.addfile(tarfile.TarInfo("8.json"), io.BytesIO(b""))
    rows = {"image": pictures, "text": [f"c{i}" for i in range(6)]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "h")
    (tmp_path / "m.yaml").write_text(f"- from: folder:{folder}\n")
    for ref, copy, broken in (
        (f"folder:{folder}", "cat/4.png", "cat/5.png"),
        (f"wds:{tmp_path}/s.tar", "s/4", "s/5"),
        (f"hf:{tmp_path}/h", "4", "5"),
        (f"mix:{tmp_path}/m.yaml", "0/cat/4.png", "0/cat/5.png"),
    ):
        found = check(open_source(ref), workers=0).found
        assert [name for name, _ in found["exact-duplicate"]] == [copy]
        assert [name for name, _ in found["unreadable"]] == [broken]
        if ref.startswith("wds"):
            assert [name for name, _ in found["missing-image"]] == ["s/8"] == [name for name, _ in found["bad-caption"]]
    small = check(open_source(f"folder:{folder}"), repeated=2)
    assert small.classes == {"cat": 5, "dog": 1} and not small.found.get("class-imbalance")


def test_class_imbalance_and_images_without_captions(tmp_path: Path) -> None:
    for i in range(14):
        name = tmp_path / "i" / ("many" if i < 12 else f"few{i}") / f"{i}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        scene(i).save(name)
    report = check(open_source(f"folder:{tmp_path}/i"))
    assert report.found == {"class-imbalance": [(f"few{i}", "1 samples, the largest class has 12") for i in (12, 13)]}
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        members = [(f"{i}.png", png(scene(i))) for i in range(2)] + [("1.txt", b"said")]
        for name, data in members:
            info = tarfile.TarInfo(str(name))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert check(open_source(f"wds:{tmp_path}/s.tar")).found == {"no-caption": [("s/0", "no caption")]}


def test_sources_that_make_pictures_are_checked_by_pixels() -> None:
    class Made:
        name = fingerprint = "made"
        classes = templates = ()

        def __init__(self) -> None:
            self.attributes: dict[str, Any] = {}

        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Any:
            import torch

            from clipgraft.data.base import Sample

            pixels = torch.from_numpy(np.array(scene(index % 2))).permute(2, 0, 1)
            return Sample(f"m{index}", pixels, (f"c{index}",))

    assert check(Made()).found == {"exact-duplicate": [("m2", "the same as m0")]}


# -- near duplicates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", [0, 1, 4, 9, 12])
def test_near_pairs_equal_all_pairs(distance: int) -> None:
    rng = np.random.default_rng(distance)
    base = rng.integers(0, 2**63, 60, dtype=np.uint64)
    flips = [
        int(value) ^ sum(1 << int(bit) for bit in rng.choice(64, rng.integers(1, 14), replace=False))
        for value in base
        for _ in range(4)
    ]
    hashes = np.unique(np.concatenate([base, np.array(flips, dtype=np.uint64)]))
    everything = {
        (a, b)
        for a in range(len(hashes))
        for b in range(a + 1, len(hashes))
        if bin(int(hashes[a]) ^ int(hashes[b])).count("1") <= distance
    }
    found = list(near_pairs(hashes, distance=distance))
    assert len(found) == len(set(found)) and set(found) == everything
    assert everything or distance < 4


def test_the_first_of_alike_images_stays_and_chains_end_there() -> None:
    grey = bytes([100] * 48)
    hashes = [0b0, 0b1, 0b11, 0b111 << 40, 0b0]
    assert near_duplicates(hashes, [grey] * 5, distance=1) == {1: 0, 4: 0}
    other = bytes([100 + COLOUR + 1] * 48)
    assert near_duplicates([5, 5, 5], [grey, other, other], distance=4) == {2: 1}
    assert near_duplicates([5, 4], [grey, other], distance=4) == {}


def test_scaled_and_compressed_copies_are_near_and_other_images_far() -> None:
    def distance(a: int, b: int) -> int:
        return bin(a ^ b).count("1")

    for seed in range(8):
        image = scene(seed, 96)
        buffer = io.BytesIO()
        image.resize((60, 60)).save(buffer, "JPEG", quality=80)
        assert distance(perceptual_hash(image), perceptual_hash(Image.open(buffer).convert("RGB"))) <= 4
        assert distance(perceptual_hash(image), perceptual_hash(scene(seed + 50, 96))) > 12


# -- captions ----------------------------------------------------------------------------------------------------------


def test_a_caption_is_too_long_exactly_when_a_token_is_cut() -> None:
    full = longer_than_context(TinyTokenizer(context_length=8), 0)
    assert full([" ".join(["red"] * n) for n in range(1, 12)]) == [n > 6 for n in range(1, 12)]


def test_the_context_of_a_model_decides_when_one_is_given(tmp_path: Path, monkeypatch: Any) -> None:
    scene(1).save(tmp_path / "a.png")
    scene(2).save(tmp_path / "b.png")
    (tmp_path / "t.csv").write_text(f"image,caption\na.png,{'red ' * 14}\nb.png,{'red ' * 15}\n")
    assert not check(open_source(f"csv:{tmp_path / 't.csv'}")).found
    from clipgraft.testing.tiny import tiny_clip

    monkeypatch.setattr("clipgraft.encoders.load", lambda uri, registry: tiny_clip())
    found = CliRunner().invoke(app, ["check", f"csv:{tmp_path / 't.csv'}", "--model", "tiny", "--json"])
    (example,) = json.loads(found.stdout)["findings"]["long-caption"]["examples"]
    assert example["id"] == "b.png" and "longer than the model's context" in example["reason"]


def test_kinds_are_described() -> None:
    assert all(KINDS.values()) and set(EXPECTED) < set(KINDS)
