"""Frames of a video by their number in decoding order; and what can be known of a file before that.

Frames are counted as the decoder gives them. Seeking and time stamps are not used: in files with B-frames, as many AVI
of UCF101 and HMDB51 are, both return neighbours of the frame that was asked for. PyAV decodes; torchcodec may where it
is exact (``torchcodec_frames.py``). A source is a path, or a stream that can be searched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from torch import Tensor

from clipgraft_video.torchcodec_frames import frames_by_torchcodec

SUFFIXES = frozenset((".mp4", ".avi", ".webm", ".mkv", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".3gp", ".gif"))
"""Endings of files that are taken for videos when a folder is listed."""


class BadVideo(Exception):
    """A video that can't be read; the text is one short line without the path."""


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """``frames`` that the file says to hold (0: none at all), mean ``fps`` [1/s] (0 when the file doesn't say it),

    ``height`` and ``width`` as stored, ``rotation`` [degrees] by which a player turns them.
    """

    frames: int
    fps: float
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class Frames:
    """``pixels`` (T, 3, H, W') uint8 in the order asked for; ``repeated`` of them stand in for what was damaged."""

    pixels: Tensor
    repeated: int = 0


@contextmanager
def _opened(source: Path | BinaryIO) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream, decoded on the caller's thread."""
    import av

    try:
        with av.open(str(source) if isinstance(source, Path) else source) as container:
            if not container.streams.video:
                raise BadVideo("it has no video stream")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # workers are many already
            stream.thread_type = "NONE"
            yield container, stream
    except FileNotFoundError:
        raise BadVideo("there is no such file") from None
    except av.FFmpegError as error:
        raise BadVideo(f"it can't be decoded ({' '.join(str(error.strerror or error).split())[:120]})") from None


def probe(source: Path | BinaryIO) -> VideoInfo:
    """Number of frames by counting packets (container fields are often absent or wrong), rate and size. No decoding."""
    with _opened(source) as (container, stream):
        context = stream.codec_context
        count = sum(1 for packet in container.demux(stream) if packet.size)
        rate = float(stream.average_rate) if stream.average_rate else 0.0
        return VideoInfo(count, rate, context.height, context.width)


def read_frames(
    source: Path | BinaryIO, wanted: Sequence[int], *, decoder: Literal["pyav", "torchcodec"] = "pyav"
) -> Frames:
    """The frames numbered ``wanted`` (from 0, any order, repeats allowed), as RGB, turned as a player would.

    A damaged tail is filled with the last good frame and counted. ``BadVideo`` when no frame can be decoded. What
    torchcodec can't give, PyAV reads.
    """
    at, kept, last, count = set(wanted), dict[int, np.ndarray](), None, 0
    if not at:
        raise ValueError("no frame was asked for")
    if decoder == "torchcodec":
        if (found := frames_by_torchcodec(source, wanted)) is not None:
            return Frames(found)
        if not isinstance(source, Path):
            source.seek(0)
    try:
        with _opened(source) as (container, stream):
            for frame in container.decode(stream):
                last = frame
                if count in at:
                    kept[count] = _rgb(frame)
                count += 1
                if len(kept) == len(at):
                    break
    except BadVideo:
        if last is None:
            raise
    if last is None:
        raise BadVideo("it holds no frame")
    missing = at - kept.keys()
    if missing:
        tail = _rgb(last)
        kept |= dict.fromkeys(missing, tail)
    pixels = torch.from_numpy(np.stack([kept[k] for k in wanted])).permute(0, 3, 1, 2).contiguous()
    return Frames(pixels, sum(k in missing for k in wanted))


def _rgb(frame: Any) -> np.ndarray:
    """(H, W', 3) uint8, turned by the file's display matrix."""
    pixels = frame.to_ndarray(format="rgb24")
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels
