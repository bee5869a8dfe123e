"""Scores of labelled pictures, and the thresholds that a rule takes from them."""

from __future__ import annotations

from importlib.metadata import version
from urllib.parse import parse_qs

import numpy as np

from clipgraft.data.base import BadSample, Source
from clipgraft.errors import InputError
from clipgraft.log import RunLog
from clipgraft_anomaly.detector import Detector
from clipgraft_anomaly.inspection import Masked, resized_mask
from clipgraft_anomaly.pixels import Pixels
from clipgraft_anomaly.predict_stream import Inspected, Unreadable, inspect
from clipgraft_anomaly.thresholds import Rule, Threshold, Thresholds, by_f1, by_pixel_f1, by_quantile, now
from clipgraft_anomaly.tiling import Tiling


def split_of(reference: str) -> str:
    """The split that a data reference names; ``InputError`` when it names none."""
    found = parse_qs(reference.partition("?")[2]).get("split", [])
    if not found:
        raise InputError(
            f"say which split of {reference} the threshold is chosen on, so that it can be told: "
            f"{reference}{'&' if '?' in reference else '?'}split=train (folders without train/ and test/: split=test)"
        )
    return found[-1]


def choose(
    detector: Detector,
    source: Source,
    *,
    data: str,
    split: str,
    model: str,
    sha256: str,
    rule: Rule = "quantile",
    quantile: float = 0.995,
    pixel: bool = False,
    name: str | None = None,
    tiling: Tiling | None = None,
    batch_size: int = 8,
    log: RunLog | None = None,
) -> Thresholds:
    """Every picture once. The quantile of maps is that of their largest values, so it bounds how many normal pictures

    get any mask at all; F1 of maps is over pixels, at the map's size.
    """
    log = log or RunLog(is_main=False)
    scores: tuple[list[float], list[float]] = [], []
    maxima: tuple[list[float], list[float]] = [], []
    pixels, unreadable = Pixels(), list[str]()
    with log.progress(f"inspecting {source.name}", len(source)) as bar:
        for found in inspect(detector, source, range(len(source)), tiling=tiling, batch_size=batch_size, name=name):
            bar.advance()
            if isinstance(found, Unreadable):
                unreadable.append(f"{found.name}: {found.reason}")
                continue
            if found.sample.label not in (0, 1):
                raise InputError(f"{source.name}: {found.sample.id} has no label; a threshold needs 0 (normal) or 1")
            scores[found.sample.label].append(found.score)
            maxima[found.sample.label].append(float(found.map.max()))
            if pixel and rule == "f1":
                _add(pixels, source, found, log)
    if unreadable:
        log.info(f"{len(unreadable)} of {len(source)} pictures can't be read: {'; '.join(unreadable[:3])}")
    (normal, anomalous), (low, high) = (tuple(np.array(side, float) for side in both) for both in (scores, maxima))
    local: Threshold | None = None
    if rule == "f1":
        whole = by_f1(normal, anomalous, of="pictures")
        local = by_pixel_f1(pixels.measure()[1]) if pixel else None
    else:
        whole = by_quantile(normal, anomalous, quantile=quantile, of="pictures")
        local = by_quantile(low, high, quantile=quantile, of="maps' largest values") if pixel else None
        if quantile < 1 and len(normal) * (1 - quantile) < 1:
            log.info(
                f"{len(normal)} normal pictures are too few for a quantile of {quantile:g}: the threshold lies just "
                f"above the highest of them; give {int(np.ceil(1 / (1 - quantile)))} or more"
            )
    if split == "test":
        log.info("chosen on the test split: with this threshold, numbers measured there are optimistic")
    return Thresholds(
        score=whole,
        pixel=local,
        rule=rule,
        quantile=quantile if rule == "quantile" else None,
        data=data,
        split=split,
        fingerprint=source.fingerprint,
        pictures=len(normal) + len(anomalous),
        unreadable=len(unreadable),
        optimistic=split == "test",
        class_name=name,
        model=model,
        model_sha256=sha256,
        detector=detector.header(),
        date=now(),
        version=version("clipgraft-anomaly"),
    )


def _add(pixels: Pixels, source: Source, found: Inspected, log: RunLog) -> None:
    """A picture's pixels, if its damage is known."""
    size = (found.map.shape[0], found.map.shape[1])
    try:
        told = source.mask(found.place) if isinstance(source, Masked) else source[found.place].extra.get("mask")
    except BadSample as error:
        log.info(f"{error}; its pixels are left out")
        return
    if told is not None:
        pixels.add(found.map.numpy(), resized_mask((told > 0).byte(), size).numpy())
    elif not found.sample.label:
        pixels.add(found.map.numpy(), np.zeros(size, np.uint8))
