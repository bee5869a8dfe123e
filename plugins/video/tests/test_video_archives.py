"""Videos inside a tar: read where they lie, and nothing leaves the archive."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from clipgraft.data import open_source
from clipgraft.data.base import BadSample
from clipgraft.data.loader import TrainLoader
from clipgraft.encoders.base import Preprocess
from clipgraft.errors import InputError
from clipgraft_video.archive import content, index, member_of, opened
from clipgraft_video.media import frames_of, info_of
from clipgraft_video.sources import ClipConfig, Videos, unlabelled

Write = Callable[..., Path]
Numbers = Callable[[Tensor], list[int]]


def source_of(ref: str) -> Videos:
    found = open_source(ref)
    assert isinstance(found, Videos)
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, write_video: Write) -> Path:
    """The same videos in a folder and in a tar: two classes, one video as pictures, and a Mac's shadow file."""
    root = tmp_path_factory.mktemp("archives")
    for name in ("run fast", "walk"):
        (root / "clips" / name).mkdir(parents=True)
        for k in range(2):
            write_video(root / "clips" / name / f"{k}.mp4", 20 + k, b_frames=2)
    write_video(root / "clips" / "walk" / "c.avi", 24, codec="mpeg4", b_frames=2)
    (root / "clips" / "walk" / "d").mkdir()
    for k in range(1, 13):
        picture = np.full((64, 160, 3), 20 * k, np.uint8)
        Image.fromarray(picture).save(root / "clips" / "walk" / "d" / f"img_{k}.png")
    with tarfile.open(root / "clips.tar", "w") as tar:
        tar.add(root / "clips", arcname=".")
        shadow = tarfile.TarInfo("./walk/._0.mp4")
        shadow.size = 3
        tar.addfile(shadow, io.BytesIO(b"mac"))
    return root


def test_a_tar_gives_what_its_folder_gives(place: Path) -> None:
    folder, tar = (source_of(f"video:{place}/{name}?frames=4&size=32") for name in ("clips", "clips.tar"))
    assert [f.id for f in folder.files] == [f.id for f in tar.files] and folder.classes == tar.classes
    assert [f.label for f in tar.files] == [0, 0, 1, 1, 1, 1] and len(tar) == 6
    for one, two in zip(folder, tar, strict=True):
        assert torch.equal(one.extra["frames"], two.extra["frames"])
    assert tar.content(0) == folder.content(0)
    with pytest.raises(LookupError, match="folder of pictures"):
        tar.content(next(k for k, f in enumerate(tar.files) if f.id == "walk/d"))


def test_frames_inside_a_tar_are_exact(place: Path, numbers: Numbers) -> None:
    at = [0, 7, 8, 19, 3]
    for name in ("walk/1.mp4", "walk/c.avi"):
        path = place / "clips.tar" / name
        assert numbers(frames_of(path, at).pixels) == at
        assert info_of(path) == info_of(place / "clips" / name)
    pictures = place / "clips.tar/walk/d"
    assert info_of(pictures).frames == 12
    assert frames_of(pictures, [9, 1]).pixels[:, 0, 0, 0].tolist() == [200, 40]  # img_2 comes before img_10


def test_a_tar_is_the_root_of_a_list_or_of_a_command(place: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("run fast/0.mp4 0\nwalk/1 1\n")
    listed = source_of(f"video:{tmp_path}/list.txt?root={place}/clips.tar&frames=2&size=32")
    assert listed[1].extra["frames"].shape == (2, 3, 32, 32)  # the ending is found as in a folder
    every = unlabelled(place / "clips.tar", clip=ClipConfig(frames=2, size=32))
    assert len(every) == 6 and every[0].label is None


def test_workers_read_a_tar_too(place: Path) -> None:
    source = source_of(f"video:{place}/clips.tar?frames=2&size=32")
    preprocess = Preprocess(size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)
    options = {"preprocess": preprocess, "batch_size": 6, "seed": 0, "crop": None}
    one, two = (next(iter(TrainLoader(source, workers=w, **options).iterate())) for w in (0, 1))  # type: ignore[arg-type]
    assert one.ids == two.ids and torch.equal(one.extra["frames"], two.extra["frames"])


def packed(file: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(file, "w") as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file


def test_names_that_leave_links_and_devices_do_not_exist(tmp_path: Path) -> None:
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    kinds = {"link.mp4": tarfile.SYMTYPE, "hard.mp4": tarfile.LNKTYPE, "device.mp4": tarfile.CHRTYPE}
    infos = [tarfile.TarInfo(name) for name in ("../secret.mp4", f"{tmp_path}/secret.mp4", "a/../../secret.mp4")]
    for name, kind in kinds.items():
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "../secret.mp4"
        infos.append(info)
    file = packed(tmp_path / "bad.tar", *((info, b"") for info in infos), (tarfile.TarInfo("good.mp4"), b"good"))
    assert list(index(file).files) == ["good.mp4"] and content(file / "good.mp4") == b"good"
    assert member_of(file / "link.mp4") is None
    (tmp_path / "list.txt").write_text("../secret.mp4 0\nlink.mp4 1\n")
    source = source_of(f"video:{tmp_path}/list.txt?root={file}")
    with pytest.raises(BadSample, match="leaves the data folder"):
        source[0]
    with pytest.raises(BadSample, match="missing file"):
        source[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.tar", "list.txt", "secret.mp4"]  # nothing was unpacked


def test_a_member_is_a_window_of_the_file(tmp_path: Path) -> None:
    file = packed(tmp_path / "a.tar", (tarfile.TarInfo("x"), b"before"), (tarfile.TarInfo("y"), bytes(range(100))))
    with opened(file / "y") as stream:
        assert not isinstance(stream, Path)
        assert stream.read() == bytes(range(100)) and stream.read() == b""
        assert stream.seek(-3, io.SEEK_END) == 97 and stream.read(10) == bytes((97, 98, 99))
        assert stream.seek(200) == 200 and stream.read() == b""
        stream.seek(5)
        assert stream.read(2) == bytes((5, 6)) and stream.tell() == 7
    with opened(tmp_path / "no.mp4") as path:
        assert path == tmp_path / "no.mp4"


def test_a_changed_archive_is_read_anew(tmp_path: Path) -> None:
    file = packed(tmp_path / "a.tar", (tarfile.TarInfo("x.mp4"), b"one"))
    assert list(index(file).files) == ["x.mp4"]
    packed(file, (tarfile.TarInfo("x.mp4"), b"two"), (tarfile.TarInfo("y.mp4"), bytes(20_000)))
    assert list(index(file).files) == ["x.mp4", "y.mp4"] and content(file / "x.mp4") == b"two"


def test_what_is_no_plain_tar_says_so(place: Path, tmp_path: Path) -> None:
    squeezed = tmp_path / "squeezed.tar"
    with tarfile.open(squeezed, "w:gz") as tar:
        tar.add(place / "clips" / "walk" / "0.mp4", arcname="0.mp4")
    with pytest.raises(InputError, match="pack it without compression"):
        open_source(f"video:{squeezed}")
    cut = tmp_path / "cut.tar"
    cut.write_bytes((place / "clips.tar").read_bytes()[:4000])
    with pytest.raises(InputError, match=r"cut off inside|can be read in place"):
        open_source(f"video:{cut}")
    with pytest.raises(InputError, match="no folder and no tar"):
        (tmp_path / "list.txt").write_text("a.mp4 0\n")
        open_source(f"video:{tmp_path}/list.txt?root={tmp_path}/absent.tar")
