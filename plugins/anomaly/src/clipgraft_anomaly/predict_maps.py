"""Score maps as files that give their raw values back.

``.png``: 16 bits; value = low + (high - low) * pixel / 65535, with ``low`` and ``high`` in the file's text chunks and
in its line of predictions.jsonl. They are 0 and the largest value the detector can give, the same for every picture,
unless a map leaves that range. ``.npy``: float16, as it is.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from clipgraft import files
from clipgraft.errors import InputError
from clipgraft_anomaly.overlays import STRIP

MapFormat = Literal["png", "npy"]
LEVELS = 65535
FORMULA = "value = low + (high - low) * pixel / 65535"
Floats = NDArray[np.float32]


def write_map(path: Path, scores: Floats, *, limit: float = 1.0) -> tuple[float, float]:
    """Write scores (H, W') as ``path``'s suffix says; returns (low, high) of the code."""
    low, high = min(0.0, float(scores.min())), max(limit, float(scores.max()))
    buffer = io.BytesIO()
    if path.suffix == ".npy":
        np.save(buffer, scores.astype(np.float16), allow_pickle=False)
    else:
        told = PngInfo()
        for key, value in {"low": repr(low), "high": repr(high), "formula": FORMULA}.items():
            told.add_text(key, value)
        pixels = np.empty(scores.shape, np.uint16)
        for start in range(0, len(scores), STRIP):
            rows = slice(start, start + STRIP)
            pixels[rows] = ((scores[rows].astype(np.float64) - low) * (LEVELS / (high - low))).round()
        Image.fromarray(pixels).save(buffer, "PNG", pnginfo=told, compress_level=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(path, buffer.getvalue())
    return low, high


def read_map(path: Path | str) -> Floats:
    """The raw scores (H, W') float32 of a file that ``write_map`` wrote."""
    path = Path(path)
    try:
        if path.suffix == ".npy":
            stored: NDArray[Any] = np.load(path, allow_pickle=False)
            return stored.astype(np.float32)
        with Image.open(path, formats=("PNG",)) as opened:
            pixels = np.asarray(opened)
            text = opened.info
            low, high = float(text["low"]), float(text["high"])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} is no map that clipgraft wrote ({type(error).__name__}); predict it again") from None
    levels = low + (high - low) / LEVELS * np.arange(LEVELS + 1)
    found: Floats = levels.astype(np.float32)[pixels]
    return found


def map_limit(header: dict[str, Any]) -> float:
    """The largest value a detector's map can take, from its header: probabilities, or a sum of some."""
    read, windows = header.get("read", {}), header.get("windows", {})
    if read.get("fuse") == "sum":
        return float(len(read.get("layers") or (0,)))
    return 2.0 if windows.get("combine") == "sum" else 1.0
