"""A detector measured on a data set: per kind of part, and the mean over those for which a metric is defined."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from clipgraft.data.base import BadSample, Sample, Source
from clipgraft.data.loader import BadSamples, evaluation_batches, stack_images
from clipgraft.errors import ClipgraftError, InputError
from clipgraft.evaluation.base import Evaluation
from clipgraft.evaluation.statistics import Statistic
from clipgraft.log import RunLog
from clipgraft_anomaly.detector import Detector, detect
from clipgraft_anomaly.inspection import check_labels, mask_of, name_of, resized_mask
from clipgraft_anomaly.layouts import PartFiles
from clipgraft_anomaly.metrics import auroc, average_precision, best_f1, curve, rank, thinned
from clipgraft_anomaly.picture_statistics import PictureMetric, Pictures
from clipgraft_anomaly.pixels import Pixels

IMAGE: tuple[PictureMetric, ...] = ("image_auroc", "image_ap", "image_f1_max")
PIXEL = ("pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro", "aupro_legacy")
METRICS = (*IMAGE, *PIXEL)
"""``*_f1_max`` are oracles: their thresholds are chosen on the pictures that they are measured on."""

Curve = tuple[list[float], list[float]]


@dataclass(frozen=True, slots=True)
class PartResult:
    """One kind of part; a metric is None where it is undefined.

    ``counts``: pictures, normal, anomalous, masked (pictures that pixel metrics saw), regions. ``threshold``: the
    score behind ``image_f1_max``. ``curves``: "image ROC", "pixel ROC" and "PRO" as (false positive rates, values).
    """

    object: str
    metrics: Mapping[str, float | None]
    counts: Mapping[str, int]
    threshold: float | None = None
    curves: Mapping[str, Curve] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Report:
    """What was found. ``records``: one per picture in source order, with id, object, kind, label, score, map_max."""

    parts: tuple[PartResult, ...]
    records: tuple[Mapping[str, Any], ...]
    header: Mapping[str, Any]
    skipped: int = 0
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def mean(self) -> dict[str, float | None]:
        """Every metric's unweighted mean over the parts that define it."""
        return {name: _mean([part.metrics[name] for part in self.parts]) for name in METRICS}

    @property
    def undefined(self) -> dict[str, list[str]]:
        """{metric: parts that its mean leaves out}."""
        found = {name: [p.object for p in self.parts if p.metrics[name] is None] for name in METRICS}
        return {name: parts for name, parts in found.items() if parts}

    def evaluation(self) -> Evaluation:
        """The means as an ``Evaluation``; ``undefined`` counts what they leave out, in pairs of part and metric."""
        metrics = {name: value for name, value in self.mean.items() if value is not None}
        left_out = sum(len(parts) for parts in self.undefined.values())
        metrics |= {"objects": float(len(self.parts))} | ({"undefined": float(left_out)} if left_out else {})
        statistics: dict[str, Statistic] = {name: Pictures(name) for name in IMAGE if name in metrics}
        return Evaluation(metrics, {}, self.records, statistics, lower=frozenset({"undefined"} & metrics.keys()))

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types, without curves and records."""
        parts = {p.object: {**p.metrics, **p.counts, "image_f1_threshold": p.threshold} for p in self.parts}
        return {
            "detector": dict(self.header),
            "mean": self.mean,
            "objects": parts,
            "undefined": self.undefined,
            "oracle": ["image_f1_max", "pixel_f1_max"],
            "pictures": len(self.records),
            "skipped": self.skipped,
            "notes": list(self.notes),
            "seconds": round(self.seconds, 2),
        }


def evaluate_detector(
    detector: Detector,
    source: Source,
    *,
    batch_size: int = 8,
    log: RunLog | None = None,
    name: str | None = None,
    workers: int | None = None,
) -> Report:
    """Every readable picture once, squashed to the detector's size; masks follow (bilinear, above one half).

    ``name`` stands for the parts' own names in prompts. For another size or for tiles give a detector of that size.
    Pictures without a mask though they are anomalous, and those
    whose mask can't be read, count in the metrics of whole pictures alone. A map is kept only as long as its part has
    pictures to come, where the source knows.
    """
    check_labels(source)
    began, log = time.monotonic(), log or RunLog(is_main=False)
    bad, problems, records = BadSamples(len(source)), [], list[dict[str, Any]]()
    pixels: dict[str, Pixels] = {}
    parts: dict[str, PartResult] = {}
    masked: Counter[str] = Counter()
    left = Counter(row.object for row in source.rows) if isinstance(source, PartFiles) else Counter[str]()
    device = next(detector.parameters(), torch.empty(0)).device
    with log.progress(f"inspecting {source.name}", len(source)) as bar:
        batches = evaluation_batches(
            source, preprocess=detector.preprocess, batch_size=batch_size, bad=bad, workers=workers
        )
        for index, sample, score, scores in _scored(detector, batches, bad, source=source, name=name, device=device):
            part, mask = name_of(source, sample), None
            try:
                mask = _mask(source, index, sample)
            except BadSample as error:
                problems.append(str(error))
            here = pixels.setdefault(part, Pixels())
            record = _record(source, sample, part, score, scores) | {"masked": mask is not None}
            if mask is not None:
                small = resized_mask(mask, (scores.shape[0], scores.shape[1])).numpy()
                if mask.any() and not small.any():
                    problems.append(f"{sample.id}: its damage vanishes at {scores.shape[1]} px")
                here.add(scores, small)
                masked[part] += 1
            records.append(record)
            left[part] -= 1
            if left[part] == 0:
                parts[part] = _part(part, records, pixels.pop(part), masked[part])
            bar.advance()
    if not records:
        raise InputError(f"{source.name}: {bad}; nothing is left to measure")
    for part, collected in pixels.items():
        parts[part] = _part(part, records, collected, masked[part])
    order = dict.fromkeys(record["object"] for record in records)
    notes = [*getattr(source, "notes", ()), *([str(bad)] if bad.count else []), *problems[:10]]
    if len(problems) > 10:
        notes.append(f"... and {len(problems) - 10} masks more")
    seconds = time.monotonic() - began
    found = tuple(parts[part] for part in order)
    return Report(found, tuple(records), detector.header(), bad.count, tuple(notes), seconds)


def _scored(
    detector: Detector,
    batches: Iterator[list[Any]],
    bad: BadSamples,
    *,
    source: Source,
    name: str | None,
    device: torch.device,
) -> Iterator[tuple[int, Sample, float, np.ndarray]]:
    """Place in the source, sample, score, and map (S, S) float32 of every picture."""
    places = iter(range(len(source)))
    for items in batches:
        names = [name or name_of(source, item) for item in items]
        found = detect(detector, stack_images(items).to(device), names)
        scores, maps = found.score.double().cpu(), found.map.float().cpu().numpy()
        for item, score, one in zip(items, scores.tolist(), maps, strict=True):
            if not np.isfinite(score) or not np.isfinite(one).all():
                raise ClipgraftError(f"{detector.method} gave {item.id} a score that is no number; check its weights")
            index = next(place for place in places if place not in bad.indices)
            yield index, item, score, one


def _mask(source: Source, index: int, sample: Sample) -> torch.Tensor | None:
    """The picture's mask; batches carry no ``extra``, so that sources which keep masks there are read again."""
    if not hasattr(source, "mask"):
        sample = source[index]
    return mask_of(source, index, sample)


def _record(source: Source, sample: Sample, part: str, score: float, scores: np.ndarray) -> dict[str, Any]:
    if sample.label not in (0, 1):
        raise InputError(f"{source.name}: {sample.id} has label {sample.label}; inspection needs 0 (normal) or 1")
    kinds, kind = source.attributes.get("kind"), sample.attributes.get("kind")
    told = kinds[kind] if kinds is not None and kind is not None else source.classes[sample.label]
    return {
        "id": sample.id,
        "object": part,
        "kind": told,
        "label": int(sample.label),
        "score": score,
        "map_max": float(scores.max()),
    }


def _part(part: str, records: list[dict[str, Any]], pixels: Pixels, masked: int) -> PartResult:
    """All metrics of one kind of part."""
    rows = [record for record in records if record["object"] == part]
    scores, labels = np.array([row["score"] for row in rows]), np.array([row["label"] for row in rows], bool)
    whole = rank(scores[labels], scores[~labels])
    f1, threshold = best_f1(whole)
    local, counts = pixels.measure()
    curves = {"image ROC": thinned(*curve(whole))} if whole.defined else {}
    if counts.defined:
        curves |= {"pixel ROC": thinned(*curve(counts)), "PRO": thinned(*curve(counts, regions=True))}
    pictures = (auroc(whole), average_precision(whole), f1)
    values = (*pictures, local.auroc, local.ap, local.f1_max, local.aupro, local.aupro_legacy)
    seen = {"pictures": len(rows), "normal": int((~labels).sum()), "anomalous": int(labels.sum())}
    seen |= {"masked": masked, "regions": pixels.regions}
    return PartResult(part, dict(zip(METRICS, values, strict=True)), seen, threshold, curves)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
