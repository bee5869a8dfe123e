"""The second pass of predict: every picture with its heat map, in colours that mean the same in all of them."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clipgraft import files
from clipgraft.data.base import BadSample
from clipgraft.data.images import ImageFiles, read_image
from clipgraft.log import RunLog
from clipgraft_anomaly.overlays import outlined, overlay
from clipgraft_anomaly.predict_lines import Line, Lines
from clipgraft_anomaly.predict_maps import read_map

HIGHEST = 0.99
"""The colour scale ends at this quantile of the pictures' largest scores."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Thresholds in use, and where they come from."""

    score: float | None = None
    pixel: float | None = None
    source: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"score": self.score, "pixel": self.pixel, "source": self.source}


def overlay_path(file: str) -> str:
    """Where a picture's overlay is, below the output folder."""
    return f"overlays/{file}.jpg"


def colour_scale(lines: Iterable[Line]) -> tuple[float, float]:
    """Ends of the colours for all pictures: what is usual, and nearly the largest score there is."""
    medians, maxima = zip(*((line["map_median"], line["map_max"]) for line in lines), strict=True)
    low, high = float(np.median(medians)), float(np.quantile(maxima, HIGHEST))
    return low, max(high, low)


def draw_all(
    source: ImageFiles,
    lines: Lines,
    header: dict[str, Any],
    out: Path,
    limits: Limits,
    *,
    scale: tuple[float, float] | None,
    log: RunLog,
) -> None:
    """The overlays that are missing; all of them when the scale changed."""
    scored = [line for line in lines.done.values() if "error" not in line]
    if not scored:
        return
    low, high = scale or colour_scale(scored)
    same = header["scale"] == [low, high]
    header["scale"] = [low, high]
    lines.write({**header, "status": "scored"})
    todo = [line for line in scored if not (same and (out / overlay_path(line["file"])).is_file())]
    with log.progress("drawing overlays", len(scored), done=len(scored) - len(todo)) as bar:
        for line in todo:
            try:
                picture = read_image(source.root / line["file"], root=source.root, sample_id=line["file"])
            except BadSample:  # gone since it was scored
                line.pop("overlay", None)
            else:
                scores = read_map(out / line["map"])
                if picture.size != scores.shape[::-1]:
                    picture = picture.resize(scores.shape[::-1])
                drawn = overlay(np.asarray(picture), scores, (low, high))
                if limits.pixel is not None:
                    drawn = outlined(drawn, scores >= limits.pixel)
                save_image(Image.fromarray(drawn), out / overlay_path(line["file"]), "JPEG", quality=90, subsampling=0)
            bar.advance()
    for line in scored:
        if (out / overlay_path(line["file"])).is_file():
            line["overlay"] = overlay_path(line["file"])


def save_image(image: Image.Image, path: Path, kind: str, **more: Any) -> None:
    """Write an image file in one rename."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(path, buffer.getvalue())
