"""Videos with the frame's number painted in, written by the tests themselves."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from clipgraft.encoders import load
from clipgraft.encoders.base import Encoder

BITS, BLOCK = 10, 16


def painted(number: int, *, height: int = 64, width: int = 160) -> np.ndarray:
    """(H, W', 3) uint8: ten bits of ``number`` as black and white blocks of 16 pixels in the first row, grey below."""
    picture = np.full((height, width, 3), 128, np.uint8)
    for bit in range(BITS):
        picture[:BLOCK, bit * BLOCK : (bit + 1) * BLOCK] = 255 if number >> bit & 1 else 0
    return picture


def painted_numbers(frames: Tensor) -> list[int]:
    """The numbers of (T, 3, H, W') uint8 frames."""
    blocks = frames[:, :, 4:12].float().mean((1, 2))
    bits = [[float(row[bit * BLOCK + 4 : bit * BLOCK + 12].mean()) > 128 for bit in range(BITS)] for row in blocks]
    return [sum(on << bit for bit, on in enumerate(row)) for row in bits]


def write(
    path: Path,
    n: int,
    *,
    codec: str = "libx264",
    b_frames: int = 0,
    rate: int = 25,
    height: int = 64,
    width: int = 160,
    pixel_format: str = "yuv420p",
    steps: list[int] | None = None,
) -> Path:
    """A video of n painted frames; ``steps``: time stamps of an uneven rate [frames]."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.codec_context.max_b_frames = b_frames
        stream.codec_context.time_base = Fraction(1, rate)
        if codec == "mpeg4":
            stream.bit_rate = 4_000_000
        for number in range(n):
            frame = av.VideoFrame.from_ndarray(painted(number, height=height, width=width), format="rgb24")
            frame.pts = number if steps is None else steps[number]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="session")
def write_video() -> Callable[..., Path]:
    """``write_video(path, n, ...)``."""
    return write


@pytest.fixture(scope="session")
def numbers() -> Callable[[Tensor], list[int]]:
    """Which frames these are."""
    return painted_numbers


@pytest.fixture(scope="session")
def vit_b_16() -> Encoder:
    """ViT-B/16 without numbers (torch's meta device), to count what a paper trains; copy it before a graft."""
    with torch.device("meta"):
        return load("open_clip:ViT-B-16-quickgelu")
