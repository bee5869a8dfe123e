"""The pictures that say most about a detector: where it is most wrong and most right, with maps and true outlines."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from clipgraft.data.base import BadSample, Sample, Source, entry_of
from clipgraft.data.images import as_rgb
from clipgraft.errors import ClipgraftError
from clipgraft.log import RunLog
from clipgraft_anomaly.detector import Detector
from clipgraft_anomaly.evaluate import Report
from clipgraft_anomaly.inspection import mask_of
from clipgraft_anomaly.overlays import outlined, overlay
from clipgraft_anomaly.predict_overlays import HIGHEST
from clipgraft_anomaly.predict_stream import Inspected, inspect
from clipgraft_anomaly.tiling import resized

EACH = 3
"""Pictures of a group."""
SIDE = 192
"""Longest side of a picture on the page [pixels]; smaller ones are enlarged."""


@dataclass(frozen=True, slots=True)
class Case:
    """A picture and its heat map as data URIs."""

    id: str
    kind: str
    score: float
    picture: str
    overlay: str


@dataclass(frozen=True, slots=True)
class Group:
    """Pictures of one side and one end; ``tone`` is worst or best."""

    title: str
    note: str
    tone: str
    cases: tuple[Case, ...]


@dataclass(frozen=True, slots=True)
class PartCases:
    """Groups of one kind of part."""

    object: str
    groups: tuple[Group, ...]


@dataclass(frozen=True, slots=True)
class Gallery:
    """All kinds of part; ``scale`` are the ends of the colours of all overlays."""

    parts: tuple[PartCases, ...]
    scale: tuple[float, float]


GROUPS = (
    (1, False, "Damage with the lowest scores", "missed first", "worst"),
    (0, True, "Normal with the highest scores", "false alarms first", "worst"),
    (1, True, "Damage with the highest scores", "", "best"),
    (0, False, "Normal with the lowest scores", "", "best"),
)
"""Label, highest first, and words."""


def gallery(
    detector: Detector,
    source: Source,
    report: Report,
    *,
    name: str | None = None,
    batch_size: int = 8,
    each: int = EACH,
    log: RunLog | None = None,
) -> Gallery:
    """Inspects the chosen pictures again, since an evaluation keeps no maps.

    The colours go from the median of their maps' medians to the 0.99 quantile of the largest scores of all pictures.
    """
    chosen = {part.object: _choose(report, part.object, each=each) for part in report.parts}
    wanted = {row["id"] for groups in chosen.values() for rows in groups for row in rows}
    places = _places(source, wanted)
    log = log or RunLog(is_main=False)
    found: dict[str, Inspected] = {}
    with log.progress("worst and best pictures", len(places)) as bar:
        for one in inspect(detector, source, sorted(places.values()), batch_size=batch_size, name=name):
            if isinstance(one, Inspected):
                found[one.sample.id] = one
            bar.advance()
    if not found:
        return Gallery((), (0.0, 1.0))
    low = float(np.median([float(one.map.median()) for one in found.values()]))
    high = float(np.quantile([row["map_max"] for row in report.records], HIGHEST))
    scale = low, max(low, high)
    parts = []
    for part, groups in chosen.items():
        drawn = []
        for (_, _, title, note, tone), rows in zip(GROUPS, groups, strict=True):
            cases = [_case(source, found[row["id"]], row, scale) for row in rows if row["id"] in found]
            if cases:
                drawn.append(Group(title, note, tone, tuple(cases)))
        parts.append(PartCases(part, tuple(drawn)))
    return Gallery(tuple(parts), scale)


def _choose(report: Report, part: str, *, each: int) -> list[list[Mapping[str, Any]]]:
    """Records of every group, no picture twice; the worst are taken first."""
    rows = [row for row in report.records if row["object"] == part]
    taken: set[str] = set()
    groups = []
    for label, highest, *_ in GROUPS:
        left = [row for row in rows if row["label"] == label and row["id"] not in taken]
        first = sorted(left, key=lambda row: row["score"], reverse=highest)[:each]
        taken |= {row["id"] for row in first}
        groups.append(first)
    return groups


def _places(source: Source, wanted: Iterable[str]) -> dict[str, int]:
    """Where the pictures of these ids are."""
    missing, found = set(wanted), dict[str, int]()
    for place in range(len(source)):
        if not missing:
            break
        try:
            name = entry_of(source, place).id
        except BadSample:
            continue
        if name in missing:
            missing.discard(name)
            found[name] = place
    return found


def _case(source: Source, one: Inspected, row: Mapping[str, Any], scale: tuple[float, float]) -> Case:
    sample = source[one.place]
    share = SIDE / max(one.size)
    size = max(1, round(one.size[0] * share)), max(1, round(one.size[1] * share))
    how = Image.Resampling.NEAREST if share > 1 else Image.Resampling.LANCZOS
    shown = np.asarray(_opened(sample).resize(size[::-1], how))
    mask = _mask(source, one, sample, size)
    heated = overlay(shown, resized(one.map, size).numpy(), scale)
    return Case(row["id"], row["kind"], row["score"], *(_uri(outlined(x, mask, width=2)) for x in (shown, heated)))


def _mask(source: Source, one: Inspected, sample: Sample, size: Sequence[int]) -> NDArray[np.bool_]:
    """The true mask at the page's size; nothing where nobody knows."""
    try:
        told = mask_of(source, one.place, sample)
    except (BadSample, ClipgraftError):
        told = None
    if told is None:
        return np.zeros((size[0], size[1]), bool)
    image = Image.fromarray(told.numpy() * 255).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(image) > 127


def _opened(sample: Sample) -> Image.Image:
    picture = sample.image
    if isinstance(picture, Tensor):
        return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    return as_rgb(picture)


def _uri(pixels: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=84, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
