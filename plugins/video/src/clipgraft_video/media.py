"""One way to the frames of a video, be it a file or a folder of numbered pictures, on the disk or inside a tar."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from clipgraft.data.base import BadSample
from clipgraft.data.images import MAX_PIXELS, decode_image
from clipgraft_video.archive import inside, is_folder, opened
from clipgraft_video.decoding import BadVideo, Frames, VideoInfo, probe, read_frames

PICTURES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp"))


def info_of(path: Path, *, fps: float = 25.0, max_pixels: int = MAX_PIXELS) -> VideoInfo:
    """What a video holds. A folder is a video of its pictures, shown at ``fps`` since nothing says it."""
    if is_folder(path):
        files = numbered(path)
        height, width = _pixels(files[0], max_pixels).shape[:2]
        return VideoInfo(len(files), fps, height, width)
    with opened(path) as source:
        found = probe(source)
    if not found.frames:
        raise BadVideo("it holds no frame")
    if found.height * found.width > max_pixels:
        raise BadVideo(f"refused: {found.width} x {found.height} pixels exceed max_pixels {max_pixels}")
    return found


def frames_of(
    path: Path,
    wanted: Sequence[int],
    *,
    max_pixels: int = MAX_PIXELS,
    decoder: Literal["pyav", "torchcodec"] = "pyav",
) -> Frames:
    """The frames numbered ``wanted`` (from 0), (T, 3, H, W') uint8."""
    if not is_folder(path):
        with opened(path) as source:
            return read_frames(source, wanted, decoder=decoder)
    files = numbered(path)
    seen = {k: _pixels(files[min(k, len(files) - 1)], max_pixels) for k in sorted(set(wanted))}
    if len({pixels.shape for pixels in seen.values()}) > 1:
        raise BadVideo("its pictures differ in size")
    return Frames(torch.from_numpy(np.stack([seen[k] for k in wanted])).permute(0, 3, 1, 2).contiguous())


def numbered(folder: Path) -> list[Path]:
    """The pictures of a folder by the last number in their names, img_2 before img_10."""
    here = folder.iterdir() if folder.is_dir() else inside(folder) or []
    files = [f for f in here if f.suffix.lower() in PICTURES and not f.name.startswith(".")]
    if not files:
        raise BadVideo("the folder holds no picture")

    def order(file: Path) -> tuple[int, str]:
        numbers = re.findall(r"\d+", file.stem)
        return (int(numbers[-1]) if numbers else -1), file.name

    return sorted(files, key=order)


def _pixels(path: Path, max_pixels: int) -> np.ndarray:
    """(H, W', 3) uint8."""
    try:
        with opened(path) as source:
            return np.asarray(decode_image(source, sample_id=path.name, max_pixels=max_pixels))
    except BadSample as error:
        raise BadVideo(str(error)) from None
