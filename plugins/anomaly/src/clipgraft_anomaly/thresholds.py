"""Thresholds: how they are chosen from labelled pictures, kept beside a detector, and refused for another one.

A picture or a pixel is anomalous when its score isn't below the threshold.
"""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError
from torch import Tensor

from clipgraft import files
from clipgraft.config.schema import Config
from clipgraft.errors import InputError
from clipgraft_anomaly.detector import Detector
from clipgraft_anomaly.metrics import Floats, Ranking, best_f1, rank
from clipgraft_anomaly.tiling import Tiling

FILE = "thresholds.json"
Rule = Literal["f1", "quantile"]
ROUNDING = 1e-6
"""By how much the same picture's score may differ in batches of another size, relative to 1 or the score."""


class Threshold(Config):
    """One number and how it came to be. Rates are those on the data it was chosen from, so they flatter."""

    value: float = Field(description="scores not below it are anomalous")
    of: str = Field(description="what scores it was chosen from")
    normal: int = Field(ge=0, description="how many of them are normal")
    anomalous: int = Field(ge=0, description="how many are anomalous")
    false_alarms: float | None = Field(None, description="share of the normal ones that reach it")
    found: float | None = Field(None, description="share of the anomalous ones that reach it; null without any")
    f1: float | None = Field(None, description="F1 there, with the rule f1")


class Thresholds(Config):
    """``thresholds.json``."""

    schema_: Literal[1] = Field(1, alias="schema", description="of this file")
    score: Threshold = Field(description="for whole pictures")
    pixel: Threshold | None = Field(None, description="for maps; null when none was asked for")
    rule: Rule = Field(description="f1: the largest F1; quantile: of normal pictures")
    quantile: float | None = Field(None, description="which, with the rule quantile")
    data: str = Field(description="reference of the data")
    split: str = Field(description="their split")
    fingerprint: str = Field(description="of the data, as they were")
    pictures: int = Field(ge=0, description="how many were inspected")
    unreadable: int = Field(0, ge=0, description="how many could not be read")
    optimistic: bool = Field(description="whether the split is the one that tests are made on")
    class_name: str | None = Field(None, description="what prompts called the parts; null: their own names")
    model: str = Field(description="reference of the detector")
    model_sha256: str = Field(description="of its weights and settings")
    detector: dict[str, Any] = Field(description="its settings")
    date: str = Field(description="when, UTC")
    version: str = Field(description="of clipgraft-anomaly")

    def source(self) -> str:
        """Where the numbers come from, in a line."""
        how = "largest F1" if self.rule == "f1" else f"{self.quantile:g} quantile of normal pictures"
        warning = "; optimistic on that split" if self.optimistic else ""
        return f"stored: {how} of {self.data} (split {self.split}, {self.pictures} pictures, {self.date}){warning}"


def identity(detector: Detector, tiling: Tiling | None = None) -> str:
    """Hex sha256 of all that scores depend on: every tensor, the preprocessing, settings and tiles."""
    settings = {"detector": detector.header(), "preprocess": detector.preprocess.as_dict()}
    settings["tiles"] = {} if tiling is None else {"tile": tiling.tile, "overlap": tiling.overlap}
    unique: dict[object, tuple[str, Tensor]] = {}
    for name, tensor in sorted(detector.state_dict().items()):
        unique.setdefault((tensor.data_ptr(), tuple(tensor.shape), str(tensor.dtype)), (name, tensor))
    digest = files.tensors_digest({name: tensor for name, tensor in unique.values()})
    return hashlib.sha256((digest + json.dumps(settings, sort_keys=True, default=list)).encode()).hexdigest()


def by_quantile(normal: Floats, anomalous: Floats, *, quantile: float, of: str) -> Threshold:
    """The lowest threshold that at most a share of 1 - ``quantile`` of the normal scores reaches, and a hair more."""
    if not len(normal):
        raise InputError("a quantile of normal pictures needs normal pictures, these data have none; give others")
    ordered = np.sort(normal.astype(np.float64))
    allowed = int((1 - quantile) * len(ordered) + 1e-9)  # 1 - 0.9 is a little less than 0.1
    highest = float(ordered[len(ordered) - 1 - allowed])
    return _told(highest + ROUNDING * max(1.0, abs(highest)), normal, anomalous, of=of)


def by_f1(normal: Floats, anomalous: Floats, *, of: str) -> Threshold:
    """Half-way between the anomalous score with the largest F1 and the next lower score of any picture."""
    f1, lowest = best_f1(rank(anomalous, normal))
    if f1 is None or lowest is None:
        raise InputError(
            f"F1 needs normal and anomalous pictures, these data have {len(normal)} and {len(anomalous)}; give others, "
            "or --rule quantile, which needs normal ones alone"
        )
    below = [scores[scores < lowest].max() for scores in (normal, anomalous) if (scores < lowest).any()]
    value = (lowest + float(max(below))) / 2 if below else lowest
    return _told(value, normal, anomalous, of=of, f1=f1)


def by_pixel_f1(found: Ranking) -> Threshold:
    """The score of a damaged pixel with the largest F1 over all pixels."""
    f1, value = best_f1(found)
    if f1 is None or value is None:
        raise InputError("F1 of pixels needs masks with damage, these data have none; give others, or --rule quantile")
    at = int(np.flatnonzero(found.threshold == value)[0])
    return Threshold(
        value=value,
        of="pixels of pictures whose damage is known, and of normal ones",
        normal=found.normal,
        anomalous=found.anomalous,
        false_alarms=float(found.reached[at] / found.normal),
        found=float(found.hits[at] / found.anomalous),
        f1=f1,
    )


def _told(value: float, normal: Floats, anomalous: Floats, *, of: str, f1: float | None = None) -> Threshold:
    return Threshold(
        value=value,
        of=of,
        normal=len(normal),
        anomalous=len(anomalous),
        false_alarms=float((normal >= value).mean()) if len(normal) else None,
        found=float((anomalous >= value).mean()) if len(anomalous) else None,
        f1=f1,
    )


def place(model: str) -> Path | None:
    """Where a detector's thresholds are kept: in its export; None for a model that is no folder of ours."""
    from clipgraft.checkpoint import MANIFEST

    folder = Path(model)
    folder = folder / "export" if (folder / "export" / MANIFEST).is_file() else folder
    return folder / FILE if (folder / MANIFEST).is_file() else None


def read_thresholds(path: Path) -> Thresholds:
    """The file, refused when it isn't one of ours."""
    try:
        return Thresholds.model_validate_json(path.read_bytes())
    except OSError:
        raise InputError(f"{path} is missing; make it with clipgraft anomaly threshold MODEL --data REF") from None
    except ValidationError as error:
        wrong = error.errors()[0]
        where = ".".join(map(str, wrong["loc"])) or "it"
        raise InputError(f"{path} holds no thresholds: {where}: {wrong['msg']}; make it again") from None


def write_thresholds(path: Path, found: Thresholds) -> None:
    """One JSON document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, found.model_dump(mode="json", by_alias=True))


def check_model(found: Thresholds, sha256: str, *, path: Path) -> None:
    """Raise unless the thresholds are those of this detector with these settings."""
    if found.model_sha256 != sha256:
        raise InputError(
            f"{path} was made for another detector or other settings ({found.model}, sha256 "
            f"{found.model_sha256[:12]}, this one has {sha256[:12]}): weights, --method, --set and --tile must be the "
            "same; make it again with clipgraft anomaly threshold"
        )


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
