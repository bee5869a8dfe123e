"""Folders and tables of image files, good ones and bad ones."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from clipgraft.data import open_source
from clipgraft.data.base import BadSample, Source
from clipgraft.data.images import as_rgb, read_image
from clipgraft.errors import InputError
from clipgraft.registry import Registry

RED, BLUE = (255, 0, 0), (0, 0, 255)


def picture(path: Path, color: tuple[int, int, int] = RED, size: tuple[int, int] = (8, 6)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def skimage_file(name: str) -> Path:
    skimage = pytest.importorskip("skimage")
    return Path(skimage.__file__).parent / "data" / name


def read(path: Path, max_pixels: int = 10**8) -> Image.Image:
    return read_image(path, root=path.parent.resolve(), sample_id=path.name, max_pixels=max_pixels)


def reason(path: Path, max_pixels: int = 10**8) -> str:
    with pytest.raises(BadSample) as caught:
        read(path, max_pixels)
    assert caught.value.sample_id == path.name
    assert "\n" not in caught.value.reason and str(path.parent) not in caught.value.reason
    return caught.value.reason


# -- folders -----------------------------------------------------------------------------------------------------------


def test_class_folders_give_sorted_labels_and_stable_ids(tmp_path: Path) -> None:
    for name in ("dog/b.png", "cat/a.JPG", "cat/deep/c.png", "dog/.hidden.png", ".git/x.png", "cat/notes.txt"):
        path = tmp_path / name
        picture(path) if path.suffix != ".txt" else path.write_text("no image")
    source = open_source(f"folder:{tmp_path}")
    assert isinstance(source, Source)
    assert list(source.classes) == ["cat", "dog"]
    samples = [source[i] for i in range(len(source))]
    assert [(s.id, s.label, s.captions) for s in samples] == [
        ("cat/a.JPG", 0, ()),
        ("cat/deep/c.png", 0, ()),
        ("dog/b.png", 1, ()),
    ]


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    picture(tmp_path / "b.png")
    picture(tmp_path / "a.png")
    (tmp_path / "masks").mkdir()
    source = open_source(f"folder:{tmp_path}")
    assert [source[i].id for i in range(2)] == ["a.png", "b.png"]
    assert list(source.classes) == [] and source[0].label is None


def test_fingerprint_follows_names_sizes_and_times(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    os.utime(path, ns=(10**18, 10**18))
    first = open_source(f"folder:{tmp_path}").fingerprint
    assert open_source(f"folder:{tmp_path}").fingerprint == first
    os.utime(path, ns=(10**18, 10**18 + 1))
    assert open_source(f"folder:{tmp_path}").fingerprint != first
    os.utime(path, ns=(10**18, 10**18))
    path.rename(tmp_path / "b.png")
    assert open_source(f"folder:{tmp_path}").fingerprint != first


def test_bad_folders_are_one_clear_line(tmp_path: Path) -> None:
    def line(folder: Path) -> str:
        with pytest.raises(InputError) as caught:
            open_source(f"folder:{folder}")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no such folder" in line(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert "no image found" in line(tmp_path / "empty")
    picture(tmp_path / "classes" / "cat" / "a.png")
    (tmp_path / "classes" / "dog").mkdir()
    assert "class folder 'dog' holds no image" in line(tmp_path / "classes")
    picture(tmp_path / "mixed" / "cat" / "a.png")
    picture(tmp_path / "mixed" / "b.png")
    assert "b.png lies beside class folders (cat/a.png)" in line(tmp_path / "mixed")


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    secret = picture(tmp_path / "outside" / "secret.png")
    picture(tmp_path / "data" / "cat" / "a.png")
    (tmp_path / "data" / "cat" / "b.png").symlink_to(secret)
    (tmp_path / "data" / "cat" / "c.png").symlink_to(tmp_path / "data" / "cat" / "a.png")
    source = open_source(f"folder:{tmp_path / 'data'}")
    with pytest.raises(BadSample, match=r"cat/b\.png: refused: the path leaves the data folder"):
        source[1]
    assert source[2].image.size == (8, 6)
    (tmp_path / "data" / "dog").symlink_to(secret.parent)
    with pytest.raises(InputError, match="dog links to a folder outside"):
        open_source(f"folder:{tmp_path / 'data'}")


# -- tables ------------------------------------------------------------------------------------------------------------


def test_table_groups_captions_and_numbers_labels(tmp_path: Path) -> None:
    picture(tmp_path / "img" / "a.png")
    picture(tmp_path / "img" / "b.png", BLUE)
    table = tmp_path / "pairs.csv"
    rows = ['img/b.png,"blue, plain",10,x', "img/a.png,rouge très vif,9,", "img/b.png,a sea,10,y"]
    table.write_text("\n".join(["\ufeffimage,caption,label,note", *rows]), encoding="utf-8")
    source = open_source(f"csv:{table}")
    assert list(source.classes) == ["9", "10"]
    assert [(source[i].id, source[i].captions, source[i].label) for i in range(2)] == [
        ("img/b.png", ("blue, plain", "a sea"), 1),
        ("img/a.png", ("rouge très vif",), 0),
    ]
    table.write_text(table.read_text().replace("a sea", "a lake"))
    assert open_source(f"csv:{table}").fingerprint != source.fingerprint


def test_labels_that_only_look_like_numbers_are_names(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    for text, classes in (("--5", ["--5"]), ("-5", ["-5"]), ("-", ["-"]), ("1.5", ["1.5"])):
        (tmp_path / "t.csv").write_text(f"image,label\na.png,{text}\n")
        assert open_source(f"csv:{tmp_path / 't.csv'}").classes == classes


def test_tab_separated_and_labels_alone(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "t.tsv").write_text("image\tcaption\na.png\tred, and more\n")
    assert open_source(f"csv:{tmp_path / 't.tsv'}")[0].captions == ("red, and more",)
    (tmp_path / "l.csv").write_text("image,label\na.png,cat\n")
    assert open_source(f"csv:{tmp_path / 'l.csv'}")[0].captions == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("file,text\na.png,red\n", "expected the columns image and caption (or label), found file, text"),
        ("", "found none"),
        ("image,caption\n", "no row below the header"),
        ("image,caption\n,red\n", "line 2: a caption without an image"),
        ("image,caption\na.png,red, or so\n", "line 2: more cells than columns"),
        ("image,label\na.png,cat\na.png,dog\n", "line 3: a.png has two labels, 'cat' and 'dog'"),
        ("image,label\na.png,cat\nb.png,\n", "b.png has no label but others have one"),
    ],
)
def test_bad_tables_are_one_clear_line(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError) as caught:
        open_source(f"csv:{tmp_path / 't.csv'}")
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_tables_that_are_no_text_are_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("image,caption\na.png,très\n".encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8 at byte"):
        open_source(f"csv:{tmp_path / 't.csv'}")
    with pytest.raises(InputError, match="no such file"):
        open_source(f"csv:{tmp_path / 'missing.csv'}")


def test_rows_that_cannot_be_used_are_bad_samples(tmp_path: Path) -> None:
    picture(tmp_path / "data" / "a.png")
    outside = picture(tmp_path / "outside.png")
    rows = ["image,caption", "a.png,", "gone.png,red", "../outside.png,red", f"{outside},red"]
    (tmp_path / "data" / "t.csv").write_text("\n".join(rows))
    source = open_source(f"csv:{tmp_path / 'data' / 't.csv'}")
    found = []
    for i in range(len(source)):
        with pytest.raises(BadSample) as caught:
            source[i]
        found.append(caught.value.reason)
    leaves = "refused: the path leaves the data folder"
    assert found == ["empty caption", "missing file", leaves, leaves]


# -- references --------------------------------------------------------------------------------------------------------


def test_unknown_references_say_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown dataset 'wds'.*(clipgraft-data|Plugin data is disabled)"):
        open_source("wds:shards.tar", registry=Registry.discover(allow=()))
    for wrong in (":x", "?a=1", ""):
        with pytest.raises(InputError, match=r"expected folder:DIR, csv:FILE or a registered dataset"):
            open_source(wrong)
    (tmp_path / "t.csv").write_text("image,caption\n")
    registry = Registry.discover(allow=())
    for path, scheme in ((tmp_path, "folder"), (tmp_path / "t.csv", "csv")):
        with pytest.raises(InputError) as caught:
            open_source(str(path), registry=registry)
        assert f"For files write {scheme}:{path}" in str(caught.value)
    with pytest.raises(InputError, match="unknown dataset 'toyworld/imags'"):
        open_source("toyworld/imags", registry=registry)


class FakeRegistry:
    """Records what a dataset was built with."""

    def __init__(self, source: object) -> None:
        self.source = source

    def build(self, kind: str, name: str, settings: dict[str, object]) -> object:
        self.asked = (kind, name, settings)
        return self.source

    def get(self, kind: str, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=f"toyworld/{name}")


def test_registered_datasets_get_typed_settings() -> None:
    registry = FakeRegistry(["a sample"])
    open_source("toyworld/images?split=test&n=200&noise=1e-2&plain=true&color=no", registry=registry)
    settings = {"split": "test", "n": 200, "noise": 0.01, "plain": True, "color": "no"}
    assert registry.asked == ("dataset", "toyworld/images", settings)
    with pytest.raises(InputError, match="'split' has no value"):
        open_source("toyworld/images?split", registry=registry)
    with pytest.raises(InputError, match="toyworld/images is empty"):
        open_source("toyworld/images", registry=FakeRegistry([]))


def test_a_name_that_is_a_folder_and_a_dataset_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = FakeRegistry(["a sample"])
    monkeypatch.chdir(tmp_path)
    open_source("photos", registry=registry)
    (tmp_path / "photos").mkdir()
    with pytest.raises(InputError, match="write folder:photos, csv:photos or toyworld/photos"):
        open_source("photos?size=8", registry=registry)
    open_source("toyworld/photos", registry=registry)


# -- images ------------------------------------------------------------------------------------------------------------


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 4), RED)
    image.paste(BLUE, (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    upright = read(tmp_path / "turned.png")
    assert upright.size == (4, 8)
    assert upright.getpixel((2, 0)) == BLUE and upright.getpixel((2, 7)) == RED


def test_transparency_becomes_white(tmp_path: Path) -> None:
    half = Image.new("RGBA", (4, 2), (255, 0, 0, 255))
    half.paste((0, 0, 0, 0), (2, 0, 4, 2))
    half.save(tmp_path / "rgba.png")
    assert [read(tmp_path / "rgba.png").getpixel((x, 0)) for x in (0, 3)] == [RED, (255, 255, 255)]
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([9, 9, 9, 255, 0, 0])
    palette.putpixel((1, 0), 0)
    palette.save(tmp_path / "p.png", transparency=0)
    assert [read(tmp_path / "p.png").getpixel((x, 0)) for x in (0, 1)] == [RED, (255, 255, 255)]
    logo = read(skimage_file("logo.png"))
    assert logo.mode == "RGB" and logo.getpixel((0, 0)) == (255, 255, 255)


def test_other_modes_become_rgb(tmp_path: Path) -> None:
    deep = Image.fromarray(np.array([[0, 257, 32896, 65535]], dtype=np.uint16))
    deep.save(tmp_path / "deep.png")
    assert [read(tmp_path / "deep.png").getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]
    Image.new("CMYK", (2, 2), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    red, green, blue = read(tmp_path / "cmyk.jpg").getpixel((0, 0))
    assert red > 240 and green < 15 and blue < 15
    assert read(skimage_file("camera.png")).mode == "RGB"
    assert read(skimage_file("no_time_for_that_tiny.gif")).mode == "RGB"
    with pytest.raises(ValueError, match="no fixed range"):
        as_rgb(Image.new("F", (2, 2)))


def test_damaged_files_have_a_short_reason(tmp_path: Path) -> None:
    whole = skimage_file("rocket.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    assert "truncated" in reason(tmp_path / "cut.jpg")
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    assert reason(tmp_path / "page.jpg") == "not an image that can be read"
    (tmp_path / "zero.png").write_bytes(b"")
    assert reason(tmp_path / "zero.png") == "not an image that can be read"
    assert reason(tmp_path / "gone.png") == "missing file"
    (tmp_path / "folder.png").mkdir()
    assert reason(tmp_path / "folder.png") == "Is a directory"
    Image.new("F", (2, 2)).save(tmp_path / "float.tif")
    assert "no fixed range" in reason(tmp_path / "float.tif")
    (tmp_path / "multi.tif").write_bytes(skimage_file("multipage_rgb.tif").read_bytes())
    assert reason(tmp_path / "multi.tif")


def test_decompression_bombs_are_refused_by_their_header(tmp_path: Path) -> None:
    for side in (12000, 20000):  # beyond our limit; beyond Pillow's own
        header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
        data = b"IDAT" + zlib.compress(bytes(1000))
        chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, data)]
        (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
        assert "pixels" in reason(tmp_path / "bomb.png")
    picture(tmp_path / "small.png", size=(100, 100))
    assert reason(tmp_path / "small.png", max_pixels=9999) == "refused: 100 x 100 pixels exceed data.max_pixels 9999"
    assert read(tmp_path / "small.png", max_pixels=10000).size == (100, 100)


def test_postscript_is_not_handed_to_an_interpreter(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "page.eps")
    (tmp_path / "page.eps").rename(tmp_path / "page.png")
    assert reason(tmp_path / "page.png") == "not an image that can be read"
