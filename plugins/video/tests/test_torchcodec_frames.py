"""torchcodec is used where it gives the frames that were asked for, and nowhere else. It needn't be installed here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from clipgraft.data import open_source
from clipgraft.errors import InputError
from clipgraft_video import torchcodec_frames
from clipgraft_video.decoding import BadVideo, probe, read_frames
from clipgraft_video.sources import Videos
from clipgraft_video.torchcodec_frames import chosen, flaw, frames_by_torchcodec

Write = Callable[..., Path]
Numbers = Callable[[Tensor], list[int]]
asked: list[list[int]] = []


class RightDecoder:
    """What torchcodec's decoder is asked for here, answered by PyAV."""

    ahead = 0

    def __init__(self, source: Any, *, num_ffmpeg_threads: int) -> None:
        assert num_ffmpeg_threads == 1
        self.source = Path(source) if isinstance(source, str) else source
        self.frames = probe(self.source).frames

    def __len__(self) -> int:
        return self.frames

    def get_frames_at(self, at: list[int]) -> SimpleNamespace:
        if not isinstance(self.source, Path):
            self.source.seek(0)
        asked.append(at)
        wanted = [min(k + self.ahead, self.frames - 1) for k in at]
        return SimpleNamespace(data=read_frames(self.source, wanted, decoder="pyav").pixels)


class AheadDecoder(RightDecoder):
    """Gives the frame behind the one that was asked for."""

    ahead = 1


class UnturnedDecoder(RightDecoder):
    """Right, but deaf to a phone's rotation."""

    def get_frames_at(self, at: list[int]) -> SimpleNamespace:
        found = super().get_frames_at(at).data
        return SimpleNamespace(data=found if found.shape[2] < found.shape[3] else torch.rot90(found, 1, (2, 3)))


class BrokenDecoder(RightDecoder):
    """Ends too early, as torchcodec 0.17 does in MPEG-4 with B-frames inside AVI."""

    def get_frames_at(self, at: list[int]) -> SimpleNamespace:
        if isinstance(self.source, Path) and self.source.suffix == ".avi":
            raise RuntimeError("no more frames")
        return super().get_frames_at(at)


@pytest.fixture(autouse=True)
def anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No answer of another test is remembered, and a real torchcodec is out of sight."""
    for name in ("torchcodec", "torchcodec.decoders"):
        monkeypatch.setitem(sys.modules, name, None)
    torchcodec_frames.forget()
    asked.clear()
    yield
    torchcodec_frames.forget()


def install(monkeypatch: pytest.MonkeyPatch, decoder: type[RightDecoder]) -> None:
    module = ModuleType("torchcodec.decoders")
    module.VideoDecoder = decoder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchcodec", ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", module)


def test_without_torchcodec_it_is_pyav() -> None:
    assert chosen("auto") == chosen("pyav") == "pyav"
    with pytest.raises(InputError, match="torchcodec is not installed; install torchcodec and FFmpeg"):
        chosen("torchcodec")


def test_an_import_that_fails_without_ffmpeg_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(ModuleType):
        def __getattr__(self, name: str) -> object:
            raise RuntimeError("Could not load libtorchcodec.\nLikely causes: ...")

    monkeypatch.setitem(sys.modules, "torchcodec", ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", Failing("torchcodec.decoders"))
    assert chosen("auto") == "pyav"
    with pytest.raises(InputError, match=r"can't be used \(Could not load libtorchcodec\.\); install"):
        chosen("torchcodec")


def test_an_exact_torchcodec_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, RightDecoder)
    assert flaw() is None and chosen("auto") == chosen("torchcodec") == "torchcodec" and chosen("pyav") == "pyav"


@pytest.mark.parametrize(
    ("decoder", "told"),
    [
        (AheadDecoder, "other frames than were asked for in MPEG-4 with B-frames in AVI"),
        (UnturnedDecoder, "does not give the frames of H.264 that a player turns"),
        (BrokenDecoder, "does not give the frames of MPEG-4 with B-frames in AVI"),
    ],
)
def test_an_inexact_one_is_not_taken_but_can_be_forced(
    monkeypatch: pytest.MonkeyPatch, decoder: type[RightDecoder], told: str
) -> None:
    install(monkeypatch, decoder)
    assert told in (flaw() or "") and chosen("auto") == "pyav"
    with pytest.warns(UserWarning, match=told):
        assert chosen("torchcodec") == "torchcodec"


def test_it_is_asked_for_each_frame_once_in_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, write_video: Write, numbers: Numbers
) -> None:
    install(monkeypatch, RightDecoder)
    file = write_video(tmp_path / "a.mp4", 30, b_frames=2)
    found = read_frames(file, [9, 3, 9, 29], decoder="torchcodec")
    assert numbers(found.pixels) == [9, 3, 9, 29] and asked == [[3, 9, 29]]
    with file.open("rb") as stream:
        assert numbers(read_frames(stream, [9, 3], decoder="torchcodec").pixels) == [9, 3]


def test_what_it_can_not_read_is_pyavs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, write_video: Write, numbers: Numbers
) -> None:
    install(monkeypatch, BrokenDecoder)
    file = write_video(tmp_path / "a.avi", 60, codec="mpeg4", b_frames=2)
    assert numbers(read_frames(file, [9, 3], decoder="torchcodec").pixels) == [9, 3]
    assert frames_by_torchcodec(write_video(tmp_path / "b.mp4", 5), [7]) is None  # beyond the end: repeated and counted
    assert read_frames(tmp_path / "b.mp4", [7], decoder="torchcodec").repeated == 1
    (tmp_path / "c.mp4").write_bytes(b"no video" * 99)
    with pytest.raises(BadVideo, match="can't be decoded"):
        read_frames(tmp_path / "c.mp4", [0], decoder="torchcodec")


def test_a_data_reference_chooses_and_decord_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, write_video: Write
) -> None:
    write_video(tmp_path / "a.mp4", 8)
    install(monkeypatch, RightDecoder)
    for decoder, used in (("auto", 1), ("torchcodec", 1), ("pyav", 0)):
        source = open_source(f"video:{tmp_path}?size=32&frames=2&decoder={decoder}")
        assert isinstance(source, Videos)
        asked.clear()
        assert source[0].extra["frames"].shape == (2, 3, 32, 32) and len(asked) == used
    with pytest.raises(InputError, match=r"decord gives other frames than were asked for .* write decoder=pyav"):
        open_source(f"video:{tmp_path}?decoder=decord")
    with pytest.raises(InputError, match="decoder"):
        open_source(f"video:{tmp_path}?decoder=opencv")


@pytest.mark.slow
def test_a_real_torchcodec_agrees_with_its_self_test(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, write_video: Write, numbers: Numbers
) -> None:
    for name in ("torchcodec", "torchcodec.decoders"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    try:
        import torchcodec.decoders  # noqa: F401
    except Exception:
        pytest.skip("torchcodec isn't installed, or FFmpeg isn't")
    file = write_video(tmp_path / "a.mp4", 60, b_frames=3)
    at = [0, 7, 8, 31, 30, 55, 59, 8]
    assert numbers(read_frames(file, at, decoder=chosen("auto")).pixels) == at
    if flaw() is None:
        file = write_video(tmp_path / "a.avi", 60, codec="mpeg4", b_frames=2)
        found = frames_by_torchcodec(file, at)
        assert found is not None and numbers(found) == at
