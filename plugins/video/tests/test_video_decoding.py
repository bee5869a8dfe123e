"""Frames come by their number in decoding order, whatever the codec, the time stamps and the damage."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from clipgraft_video.decoding import BadVideo, probe, read_frames
from clipgraft_video.media import frames_of, info_of

WANTED = [0, 7, 8, 31, 30, 55, 59, 8]

Write = Callable[..., Path]
Numbers = Callable[[Tensor], list[int]]


@pytest.mark.parametrize(
    ("name", "codec", "b_frames"),
    [
        ("a.mp4", "libx264", 0),
        ("b.mp4", "libx264", 3),
        ("c.avi", "mpeg4", 0),
        ("d.avi", "mpeg4", 2),
        ("e.webm", "libvpx-vp9", 0),
        ("a path with blanks.mkv", "libx264", 2),
    ],
)
def test_frames_are_exact(
    tmp_path: Path, write_video: Write, numbers: Numbers, name: str, codec: str, b_frames: int
) -> None:
    file = write_video(tmp_path / name, 60, codec=codec, b_frames=b_frames)
    info, found = probe(file), read_frames(file, WANTED)
    assert (info.frames, info.height, info.width) == (60, 64, 160) and info.fps == pytest.approx(25, abs=0.5)
    assert found.repeated == 0 and found.pixels.dtype == torch.uint8 and found.pixels.shape == (8, 3, 64, 160)
    assert numbers(found.pixels) == WANTED


def test_an_uneven_frame_rate_does_not_matter(tmp_path: Path, write_video: Write, numbers: Numbers) -> None:
    steps = [k * k for k in range(20)]
    file = write_video(tmp_path / "vfr.mkv", 20, steps=steps)
    assert probe(file).frames == 20 and numbers(read_frames(file, [3, 11, 19]).pixels) == [3, 11, 19]


@pytest.mark.parametrize("pixel_format", ["yuv444p", "yuv420p10le", "gray"])
def test_any_pixel_format_becomes_rgb(tmp_path: Path, write_video: Write, numbers: Numbers, pixel_format: str) -> None:
    file = write_video(tmp_path / "odd.mkv", 12, codec="ffv1", pixel_format=pixel_format)
    assert numbers(read_frames(file, [5, 11]).pixels) == [5, 11]


def test_odd_sides_are_kept(tmp_path: Path, write_video: Write) -> None:
    file = write_video(tmp_path / "odd.mkv", 3, codec="ffv1", height=33, width=161, pixel_format="yuv444p")
    assert read_frames(file, [1]).pixels.shape == (1, 3, 33, 161)


def test_a_truncated_file_repeats_its_last_good_frame(tmp_path: Path, write_video: Write, numbers: Numbers) -> None:
    whole = write_video(tmp_path / "whole.avi", 60, codec="mpeg4")
    cut = tmp_path / "cut.avi"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 4 // 5])
    found = read_frames(cut, [0, 10, 58, 59])
    seen = numbers(found.pixels)
    assert seen[:2] == [0, 10] and found.repeated == 2 and seen[2] == seen[3] < 58


def test_files_that_are_no_videos_say_why(tmp_path: Path, write_video: Write) -> None:
    text = tmp_path / "text.mp4"
    text.write_bytes(b"no video at all" * 50)
    with pytest.raises(BadVideo, match="can't be decoded"):
        read_frames(text, [0])
    with pytest.raises(BadVideo, match="no such file"):
        probe(tmp_path / "absent.mp4")
    cut = tmp_path / "cut.mp4"  # an MP4's index lies at its end
    cut.write_bytes(write_video(tmp_path / "whole.mp4", 60).read_bytes()[:2000])
    with pytest.raises(BadVideo):
        read_frames(cut, [0])
    empty = tmp_path / "empty.mp4"
    empty.touch()
    with pytest.raises(BadVideo):
        probe(empty)


def test_a_file_with_sound_alone_has_no_video_stream(tmp_path: Path) -> None:
    file = tmp_path / "sound.mkv"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(BadVideo, match="no video stream"):
        read_frames(file, [0])


def test_a_container_without_frames(tmp_path: Path) -> None:
    file = tmp_path / "none.mkv"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.mux(stream.encode())
    with pytest.raises(BadVideo):
        info_of(file)
    with pytest.raises(BadVideo):
        read_frames(file, [0])


def test_a_phone_video_is_turned_as_a_player_turns_it(tmp_path: Path, write_video: Write) -> None:
    file = write_video(tmp_path / "phone.mp4", 4, height=64, width=160)
    plain, content = read_frames(file, [2]).pixels[0], bytearray(file.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40  # version 0: the display matrix, a quarter turn clockwise
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    file.write_bytes(content)
    turned = read_frames(file, [2]).pixels[0]
    assert torch.equal(turned, torch.rot90(plain, -1, (1, 2)))


def test_a_folder_of_pictures_is_a_video(tmp_path: Path) -> None:
    for number in range(12):
        Image.fromarray(np.full((8, 8, 3), number * 20, np.uint8)).save(tmp_path / f"img_{number + 1}.png")
    assert info_of(tmp_path).frames == 12
    assert frames_of(tmp_path, [9, 1]).pixels[:, 0, 0, 0].tolist() == [180, 20]  # img_2 comes before img_10
    Image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(tmp_path / "img_13.png")
    with pytest.raises(BadVideo, match="differ in size"):
        frames_of(tmp_path, [0, 12])
