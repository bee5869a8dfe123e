"""One way to the frames of a video, be it a file or a folder of numbered pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from clipgraft.data.base import BadSample
from clipgraft.data.images import MAX_PIXELS, decode_image
from clipgraft_video.decoding import BadVideo, Frames, VideoInfo, probe, read_frames

PICTURES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp"))


def info_of(path: Path, *, fps: float = 25.0, max_pixels: int = MAX_PIXELS) -> VideoInfo:
    """What a video holds. A folder is a video of its pictures, shown at ``fps`` since nothing says it."""
    if path.is_dir():
        files = numbered(path)
        height, width = _pixels(files[0], max_pixels).shape[:2]
        return VideoInfo(len(files), fps, height, width)
    found = probe(path)
    if not found.frames:
        raise BadVideo("it holds no frame")
    if found.height * found.width > max_pixels:
        raise BadVideo(f"refused: {found.width} x {found.height} pixels exceed max_pixels {max_pixels}")
    return found


def frames_of(path: Path, wanted: Sequence[int], *, max_pixels: int = MAX_PIXELS) -> Frames:
    """The frames numbered ``wanted`` (from 0), (T, 3, H, W') uint8."""
    if not path.is_dir():
        return read_frames(path, wanted)
    files = numbered(path)
    seen = {k: _pixels(files[min(k, len(files) - 1)], max_pixels) for k in sorted(set(wanted))}
    if len({pixels.shape for pixels in seen.values()}) > 1:
        raise BadVideo("its pictures differ in size")
    return Frames(torch.from_numpy(np.stack([seen[k] for k in wanted])).permute(0, 3, 1, 2).contiguous())


def numbered(folder: Path) -> list[Path]:
    """The pictures of a folder by the last number in their names, img_2 before img_10."""
    files = [f for f in folder.iterdir() if f.suffix.lower() in PICTURES and not f.name.startswith(".")]
    if not files:
        raise BadVideo("the folder holds no picture")

    def order(file: Path) -> tuple[int, str]:
        numbers = re.findall(r"\d+", file.stem)
        return (int(numbers[-1]) if numbers else -1), file.name

    return sorted(files, key=order)


def _pixels(path: Path, max_pixels: int) -> np.ndarray:
    """(H, W', 3) uint8."""
    try:
        return np.asarray(decode_image(path, sample_id=path.name, max_pixels=max_pixels))
    except BadSample as error:
        raise BadVideo(str(error)) from None
