"""Folders of pictures with masks, written here in both layouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipgraft.data.base import BadSample
from clipgraft.errors import InputError
from clipgraft_merging.segmentation.folder import SegmentationFolder


def _picture(file: Path, size: tuple[int, int] = (12, 8)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(file)


def _mask(file: Path, values: np.ndarray, *, palette: bool = False) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values.astype(np.uint8))
    if palette:
        image = image.convert("P")
        image.putdata(values.flatten().tolist())
        image.putpalette([(37 * k) % 256 for k in range(768)])
    image.save(file)


VALUES = np.zeros((8, 12), int)
VALUES[:4], VALUES[4:, :6], VALUES[0, 0] = 1, 2, 255


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    _picture(tmp_path / "images/a/one.jpg")
    _mask(tmp_path / "masks/a/one.png", VALUES, palette=True)
    _picture(tmp_path / "images/two.png")
    _mask(tmp_path / "masks/two.png", VALUES)
    (tmp_path / "classes.txt").write_text("cat\n\ndog\n")
    return tmp_path


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    for stem in ("p1", "p2"):
        _picture(tmp_path / f"JPEGImages/{stem}.jpg")
        _mask(tmp_path / f"SegmentationClass/{stem}.png", VALUES, palette=True)
        _mask(tmp_path / f"SegmentationObject/{stem}.png", np.where(VALUES == 255, 255, VALUES > 0), palette=True)
    lists = tmp_path / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("p2\n")
    (lists / "train.txt").write_text("p1\np2\n")
    return tmp_path


def test_plain_folders_give_labels_names_and_what_does_not_count(plain: Path) -> None:
    source = SegmentationFolder(path=str(plain))
    assert [source[i].id for i in range(len(source))] == ["a/one.jpg", "two.png"]
    assert source.segments == ("cat", "dog") and source[0].image.size == (12, 8)
    for i in range(2):  # a palette's indices, not its colours
        assert torch.equal(source[i].extra["semantics"], torch.from_numpy(VALUES).to(torch.uint8))


def test_zero_may_be_background_the_first_class_or_left_out(plain: Path) -> None:
    names = ("zero", "one", "two")
    first = SegmentationFolder(path=str(plain), zero="class", classes=names)[1].extra["semantics"]
    assert first[7, 11] == 1 and first[1, 1] == 2 and first[0, 0] == 255
    out = SegmentationFolder(path=str(plain), zero="ignore")[1].extra["semantics"]
    assert out[7, 11] == 255 and out[1, 1] == 1
    other = SegmentationFolder(path=str(plain), ignore=2, classes=tuple("abc"))
    with pytest.raises(InputError, match="holds 255, but there are names for 3"):
        other[0]


def test_voc_has_lists_its_own_names_and_instances(voc: Path) -> None:
    source = SegmentationFolder(path=str(voc))
    assert len(source) == 1 and source[0].id == "p2" and len(source.segments) == 20
    assert source.segments[0] == "aeroplane" and source.segments[-1] == "tvmonitor"
    instances = source[0].extra["instances"]
    assert instances.shape == (1, 8, 12) and torch.equal(
        instances[0] > 0, torch.from_numpy((VALUES > 0) & (VALUES < 255))
    )
    assert len(SegmentationFolder(path=str(voc), split="train")) == 2


def test_the_fingerprint_follows_files_and_settings(plain: Path) -> None:
    first = SegmentationFolder(path=str(plain)).fingerprint
    assert first == SegmentationFolder(path=str(plain)).fingerprint
    assert first != SegmentationFolder(path=str(plain), zero="ignore").fingerprint
    _mask(plain / "masks/two.png", VALUES * 0)
    assert first != SegmentationFolder(path=str(plain)).fingerprint


def test_what_is_wrong_is_said_in_one_line(plain: Path, voc: Path, tmp_path: Path) -> None:
    def refused(match: str, **given: object) -> None:
        with pytest.raises(InputError, match=match):
            SegmentationFolder(**({"path": str(plain)} | given))

    refused("no such folder", path=str(tmp_path / "none"))
    refused("no list nope.txt .* train, val", path=str(voc), split="nope")
    empty = tmp_path / "empty"
    (empty / "images").mkdir(parents=True)
    refused("no folder masks", path=str(empty))
    (empty / "masks").mkdir()
    refused("no picture", path=str(empty))


def test_masks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    _picture(tmp_path / "images/a.png")
    _mask(tmp_path / "masks/a.png", VALUES[:4])
    with pytest.raises(InputError, match="no names"):
        SegmentationFolder(path=str(tmp_path))
    source = SegmentationFolder(path=str(tmp_path), classes=("a", "b"))
    with pytest.raises(InputError, match="must have its picture's size"):
        source[0]
    Image.fromarray(np.zeros((8, 12, 3), np.uint8)).save(tmp_path / "masks/a.png")
    with pytest.raises(InputError, match="class numbers"):
        source[0]
    (tmp_path / "masks/a.png").write_bytes(b"no image")
    with pytest.raises(BadSample, match=r"mask a\.png"):
        source[0]
    (tmp_path / "masks/a.png").unlink()
    with pytest.raises(InputError, match=r"has no mask masks/a\.png"):
        SegmentationFolder(path=str(tmp_path), classes=("a", "b"))


def test_a_link_out_of_the_folder_is_refused(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "m.png"
    _mask(outside, VALUES)
    (plain / "masks/two.png").unlink()
    (plain / "masks/two.png").symlink_to(outside)
    with pytest.raises(BadSample, match="leaves the data folder"):
        SegmentationFolder(path=str(plain))[1]
