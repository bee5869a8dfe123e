"""``anomaly/inspection``: a detector as an evaluator, for runs, claims and ``clipgraft eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from clipgraft.config.schema import Config
from clipgraft.data.base import PairSource, Source
from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft.evaluation.base import Evaluation
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.registry import Registry, current
from clipgraft_anomaly.current_head import current_head, part_in
from clipgraft_anomaly.detector import Detector, DetectorHead
from clipgraft_anomaly.evaluate import evaluate_detector

UNTRAINED = "anomaly/prompts"
"""What is measured as long as nothing was trained."""


class Inspection(Config):
    """Metrics of ``clipgraft anomaly eval``, as means over the kinds of part.

    Which detector, if ``method`` and ``from`` don't say: the one that the run at work has trained; else the one in the
    export that the encoder came from; else hand-written prompts. So "before" in a run that trains prompts is the
    hand-written baseline, unless its base model brought a detector. ``objects`` and ``undefined`` are counts.
    """

    method: str | None = Field(None, description="a detector that needs no training: anomaly/prompts, anomaly/winclip")
    settings: dict[str, Any] = Field(default_factory=dict, description="settings of the method")
    from_: str | None = Field(
        None, alias="from", description="run or export whose trained detector to put on the model"
    )
    name: str | None = Field(None, description="what prompts call the parts; null: their own names")
    batch_size: int = Field(16, gt=0, description="pictures per forward pass")

    @model_validator(mode="after")
    def _one_detector(self) -> Self:
        if self.method is not None and self.from_ is not None:
            raise ValueError("method and from name two detectors; give one of them")
        if self.settings and self.method is None:
            raise ValueError("settings are those of a method; name it")
        return self

    def __call__(self, features: EncoderFeatures, source: Source | PairSource) -> Evaluation:
        """Records: id, object, kind, label, score, map_max, masked."""
        if not isinstance(source, Source):
            raise InputError(f"{source.name} holds minimal pairs; inspection needs single pictures")
        detector = self.detector(features.encoder, registry=current())
        if features.log is not None:
            features.log.info(f"inspecting {source.name} with {detector.method}")
        report = evaluate_detector(
            detector,
            source,
            batch_size=self.batch_size,
            log=features.log,
            name=self.name,
            workers=features.workers,
        )
        found = report.evaluation()
        if report.skipped:
            found.metrics["skipped"] = float(report.skipped)
        return found

    def detector(self, encoder: Encoder, *, registry: Registry) -> Detector:
        """The detector over ``encoder``, which stays as it is."""
        if self.method is not None:
            head = registry.build("head", self.method, self.settings)
        elif self.from_ is not None:
            head = trained_head(Path(self.from_), registry=registry)
            if head is None:
                raise InputError(
                    f"from: {self.from_} holds no detector; give a run or export of clipgraft run anomalyclip"
                )
        else:
            head = current_head() or trained_head(Path(encoder.data.origin.uri), registry=registry)
            head = head or registry.build("head", UNTRAINED, {})
        if not isinstance(head, DetectorHead):
            raise InputError(f"method: {self.method} is no detector; methods without training are winclip and prompts")
        if problem := head.fits.problem(encoder):
            raise InputError(problem)
        device = next(encoder.parameters()).device
        return head.to(device).detector(encoder).to(device)


def trained_head(folder: Path, *, registry: Registry) -> DetectorHead | None:
    """The detector in a run or export; None when there is none."""
    return part_in(folder, DetectorHead, registry=registry)  # type: ignore[type-abstract]
