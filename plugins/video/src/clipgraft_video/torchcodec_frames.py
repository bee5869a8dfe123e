"""Frames by torchcodec, where it gives exactly those that were asked for: a test on clips of its own says so.

torchcodec finds frames by time stamps. In MPEG-4 with B-frames inside AVI, as in UCF101 and HMDB51, versions were seen
to return neighbours or nothing; so it is used only where it agrees with PyAV, which counts frames as they are decoded.
"""

from __future__ import annotations

import struct
import tempfile
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from torch import Tensor

from clipgraft.errors import InputError

Decoder = Literal["auto", "pyav", "torchcodec"]
CLIP, STEP, TOLERANCE = 24, 9, 3.0
"""Frames of a test clip, how much lighter each is than the last, and what compression may change [of 255]."""
ASKED = (0, 5, 6, 17, 3, 11, 12, 23)


def chosen(decoder: Decoder) -> Literal["pyav", "torchcodec"]:
    """The library for ``decoder``: auto takes torchcodec where it is exact. ``InputError`` when a forced one lacks."""
    if decoder == "pyav":
        return "pyav"
    if decoder == "auto":
        return "pyav" if _absent() or flaw() else "torchcodec"
    if reason := _absent():
        raise InputError(f"decoder=torchcodec: {reason}; install torchcodec and FFmpeg, or leave decoder out")
    if reason := flaw():
        warnings.warn(f"torchcodec is used as asked, but {reason}; decoder=pyav is exact", stacklevel=2)
    return "torchcodec"


def frames_by_torchcodec(source: Path | BinaryIO, wanted: Sequence[int]) -> Tensor | None:
    """(T, 3, H, W') uint8 of the frames numbered ``wanted``; None where it gives none: PyAV says what is wrong."""
    from torchcodec.decoders import VideoDecoder

    try:
        video = VideoDecoder(str(source) if isinstance(source, Path) else source, num_ffmpeg_threads=1)
        if max(wanted) >= len(video):
            return None
        at = sorted(set(wanted))
        found: Tensor = video.get_frames_at(at).data
        return found[[at.index(k) for k in wanted]]
    except Exception:  # a damaged file raises anything here
        return None


@lru_cache(maxsize=1)
def _absent() -> str | None:
    """Why torchcodec can't decode at all; None when it can. Its import fails where FFmpeg's libraries are missing."""
    try:
        from torchcodec.decoders import VideoDecoder  # noqa: F401
    except ModuleNotFoundError:
        return "torchcodec is not installed"
    except Exception as error:
        told = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return f"torchcodec can't be used ({told[:120]})"
    return None


@lru_cache(maxsize=1)
def flaw() -> str | None:
    """What torchcodec gets wrong on small clips that are written for it; None when nothing. Fractions of a second."""
    from clipgraft_video.decoding import BadVideo, read_frames

    kinds = (
        ("MPEG-4 with B-frames in AVI", "a.avi", "mpeg4"),
        ("H.264 with B-frames", "b.mp4", "libx264"),
        ("H.264 that a player turns", "c.mp4", "libx264"),
    )
    with tempfile.TemporaryDirectory() as folder:
        for told, name, codec in kinds:
            file = Path(folder) / name
            try:
                _write(file, codec, turned=name == "c.mp4")
                right = read_frames(file, ASKED, decoder="pyav").pixels
            except (BadVideo, ValueError, OSError):
                return f"PyAV writes no {told} to test it with"
            found = frames_by_torchcodec(file, ASKED)
            if found is None or found.shape != right.shape:
                return f"it does not give the frames of {told}"
            if float((found.float() - right.float()).abs().mean((1, 2, 3)).max()) > TOLERANCE:
                return f"it gives other frames than were asked for in {told}"
    return None


def _write(file: Path, codec: str, *, turned: bool) -> None:
    """A clip of plain grey frames, each lighter than the last; ``turned``: to be shown a quarter turn clockwise."""
    import av

    with av.open(str(file), "w") as container:
        stream: Any = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 4_000_000
        stream.codec_context.max_b_frames = 2
        for number in range(CLIP):
            picture = np.full((48, 64, 3), 20 + number * STEP, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    if turned:
        content = bytearray(file.read_bytes())
        matrix = content.index(b"tkhd") + 4 + 40
        content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
        file.write_bytes(content)


def forget() -> None:
    """Test anew at the next call, as after an installation."""
    _absent.cache_clear()
    flaw.cache_clear()
