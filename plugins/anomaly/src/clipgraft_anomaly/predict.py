"""A folder of pictures inspected: a line, a map, a mask and an overlay for each. First all scores, then the overlays,

because their colours mean the same in every picture.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clipgraft.data.images import MAX_PIXELS, ImageFiles
from clipgraft.errors import InputError, Interrupted
from clipgraft.log import RunLog
from clipgraft_anomaly.detector import Detector
from clipgraft_anomaly.layouts import pictures_below
from clipgraft_anomaly.predict_lines import Line, Lines
from clipgraft_anomaly.predict_maps import FORMULA, MapFormat, map_limit, write_map
from clipgraft_anomaly.predict_overlays import Limits, draw_all, overlay_path, save_image
from clipgraft_anomaly.predict_stream import Inspected, Unreadable, inspect
from clipgraft_anomaly.thresholds import now
from clipgraft_anomaly.tiling import Tiling


@dataclass(frozen=True, slots=True)
class Predicted:
    """What a call did. ``lines`` are all pictures by name, those of earlier calls too; ``new`` were scored now."""

    header: Mapping[str, Any]
    lines: tuple[Line, ...]
    new: int
    seconds: float

    @property
    def scored(self) -> list[Line]:
        """Pictures that could be read."""
        return [line for line in self.lines if "error" not in line]

    @property
    def unreadable(self) -> list[Line]:
        """The others."""
        return [line for line in self.lines if "error" in line]


def predict(
    detector: Detector,
    images: Path,
    out: Path,
    *,
    model: str,
    sha256: str,
    limits: Limits | None = None,
    name: str | None = None,
    tiling: Tiling | None = None,
    maps: MapFormat = "png",
    keep_size: bool = True,
    overlays: bool = True,
    scale: tuple[float, float] | None = None,
    batch_size: int = 8,
    resume: bool = False,
    log: RunLog | None = None,
) -> Predicted:
    """Every picture in ``images`` and below it, but for what lies in ``out``.

    ``sha256`` is the detector's ``identity``. ``keep_size`` writes maps at the picture's size, else at the detector's.
    ``scale`` fixes the ends of the overlays' colours; without, they are the median of the pictures' medians and the
    0.99 quantile of their largest scores.
    """
    log, limits, began = log or RunLog(is_main=False), limits or Limits(), time.monotonic()
    source = folder_source(images, but=out)
    header = _header(detector, images, model=model, sha256=sha256, limits=limits, name=name, tiling=tiling)
    header |= {"maps": maps, "keep_size": keep_size, "scale": None}
    lines = Lines(out)
    lines.begin(header, resume=resume)
    header["scale"] = lines.header["scale"]
    stamps = {file: _stamp(source.root / file) for file in source.ids}
    lines.done = {f: line for f, line in lines.done.items() if f in stamps and _finished(line, stamps[f], out)}
    todo = [place for place, file in enumerate(source.ids) if file not in lines.done]
    kept, limit = len(lines.done), map_limit(detector.header())
    if kept:
        log.info(f"continuing: {kept} of {len(source)} pictures are done")
    try:
        with log.progress(f"inspecting {images}", len(source), done=kept) as bar:
            for found in inspect(detector, source, todo, tiling=tiling, batch_size=batch_size, name=name):
                file = source.ids[found.place]
                line: Line = {"file": file}
                if isinstance(found, Unreadable):
                    line["error"] = found.reason
                else:
                    (out / overlay_path(file)).unlink(missing_ok=True)
                    line |= _keep(found, file, out, limits, maps=maps, keep_size=keep_size, limit=limit)
                lines.add(line | stamps[file])
                bar.advance()
        header["scale"] = header["scale"] if overlays else None
        if overlays:
            draw_all(source, lines, header, out, limits, scale=scale, log=log)
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; {len(lines.done)} of {len(source)} pictures are scored and kept; the same command with "
            "--resume goes on"
        ) from None
    rows = tuple(lines.done[file] for file in source.ids)
    counts = {"pictures": len(rows), "unreadable": sum("error" in row for row in rows)}
    if limits.score is not None:
        counts["anomalous"] = sum(row.get("label") == "anomalous" for row in rows)
    lines.write({**header, "status": "done", "counts": counts, "date": now()})
    return Predicted(lines.header, rows, len(todo), time.monotonic() - began)


def folder_source(images: Path, *, but: Path | None = None) -> ImageFiles:
    """The pictures below a folder, without hidden ones and those below ``but``."""
    root = images.expanduser().resolve()
    if not root.is_dir():
        raise InputError(f"{images} is no folder; give one with pictures in it, or in folders below it")
    found = pictures_below(root, root=root)
    if but is not None and but.resolve() != root and but.resolve().is_relative_to(root):
        inside = but.resolve().relative_to(root).as_posix() + "/"
        found = [file for file in found if not file.startswith(inside)]
    if not found:
        raise InputError(f"{images} holds no pictures (png, jpg, tif, webp, bmp, ...); give a folder that does")
    return ImageFiles(str(images), root, dict.fromkeys(found, ()), {}, (), MAX_PIXELS)


def _header(
    detector: Detector,
    images: Path,
    *,
    model: str,
    sha256: str,
    limits: Limits,
    name: str | None,
    tiling: Tiling | None,
) -> dict[str, Any]:
    """What whoever reads the lines must know."""
    settings = detector.header()
    read = settings.get("read", {})
    score = "the method's raw score of the whole picture"
    if read:
        w = read["score_weight"]
        score = f"softmax(cosines of the picture to [normal, anomalous] texts / {read['tau']:g})[anomalous]"
        score += f" * {1 - w:g} + {w:g} * the map's maximum per layer" if w else ""
    tiled = "" if tiling is None else "; of a picture cut into tiles: the highest of all tiles and of the whole picture"
    return {
        "schema": 1,
        "status": "running",
        "model": model,
        "model_sha256": sha256,
        "detector": settings,
        "layers": read.get("layers"),
        "images": str(images),
        "class_name": name,
        "thresholds": limits.as_dict(),
        "tiles": None if tiling is None else {"tile": tiling.tile, "overlap": tiling.overlap},
        "score": score + tiled + "; raw, higher is more anomalous",
        "map": "the detector's map, raw, resized bilinearly"
        + ("" if tiling is None else "; mean of overlapping tiles"),
        "map_code": f"png: {FORMULA}, with the line's map_low and map_high; npy: float16 values",
        "label": "anomalous when score >= thresholds.score; a mask is 255 where map >= thresholds.pixel",
        "colours": "overlays: from scale[0] to scale[1], the same for all pictures",
        "version": version("clipgraft-anomaly"),
        "date": now(),
    }


def _keep(
    found: Inspected, file: str, out: Path, limits: Limits, *, maps: MapFormat, keep_size: bool, limit: float
) -> Line:
    """Write a picture's map and mask; its line."""
    own = found.map.numpy()
    scores = found.map_at(found.size).numpy() if keep_size else own
    line: Line = {"score": found.score}
    if limits.score is not None:
        line["label"] = "anomalous" if found.score >= limits.score else "normal"
    line |= {"map_max": float(own.max()), "map_median": float(np.median(own)), "map": f"maps/{file}.{maps}"}
    low, high = write_map(out / line["map"], scores, limit=limit)
    line |= {"map_low": low, "map_high": high} if maps == "png" else {}
    if limits.pixel is not None:
        line["mask"] = f"masks/{file}.png"
        mask = Image.fromarray(np.where(scores >= limits.pixel, 255, 0).astype(np.uint8))
        save_image(mask, out / line["mask"], "PNG")
        line["mask_share"] = float((scores >= limits.pixel).mean())
    return line | {"width": found.size[1], "height": found.size[0], "passes": found.parts}


def _stamp(path: Path) -> dict[str, int]:
    """Size [bytes] and time of change [ns], by which a picture that was replaced is noticed."""
    try:
        found = path.stat()
    except OSError:
        return {"bytes": -1, "modified_ns": -1}
    return {"bytes": found.st_size, "modified_ns": found.st_mtime_ns}


def _finished(line: Line, stamp: Mapping[str, int], out: Path) -> bool:
    """Whether a line of an earlier call still holds: the same picture, and its files are there."""
    made = [line[key] for key in ("map", "mask") if key in line]
    return all(line.get(k) == v for k, v in stamp.items()) and all((out / file).is_file() for file in made)
