"""Heat maps for the page of a run: where its detector is most wrong and most right on the evaluation data."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

from clipgraft.errors import ClipgraftError
from clipgraft.reporting import Figure, Picture, Section
from clipgraft_anomaly.evaluate import PartResult, Report
from clipgraft_anomaly.report_cases import Case, gallery

if TYPE_CHECKING:
    from clipgraft.registry import Registry
    from clipgraft.rundir import RunRecord

EVALUATOR = "anomaly/inspection"
EACH = 2
"""Pictures of a group."""
ALL = "parts of all kinds"


def heat_maps(run: RunRecord, *, registry: Registry) -> list[Section]:
    """Damaged and normal pictures with the lowest and highest scores; nothing for runs that inspected nothing."""
    names = run.measured(EVALUATOR)
    if not names:
        return []
    from clipgraft.config.load import validate
    from clipgraft.encoders import load
    from clipgraft_anomaly.evaluator import Inspection
    from clipgraft_anomaly.inspection import open_inspection

    name, records = names[0], run.samples("after", names[0])
    reference, settings = run.data_of(name), run.node(name)
    if run.export is None or reference is None or not records:
        raise ClipgraftError("this run wrote no export" if run.export is None else f"{name} kept no records")
    asked = validate(Inspection, {k: v for k, v in settings.items() if k not in ("use", "data")}, where=EVALUATOR)
    encoder = load(str(run.path / "export"), registry=registry).requires_grad_(False).eval()
    detector = asked.detector(encoder, registry=registry).requires_grad_(False).eval()
    rows = tuple({**row, "object": ALL} for row in records)  # the worst of all, not of every kind of part
    report = Report((PartResult(ALL, {}, {}),), rows, detector.header())
    found = gallery(
        detector,
        open_inspection(reference, registry=registry),
        report,
        name=asked.name,
        batch_size=asked.batch_size,
        each=EACH,
    )
    figures = [_figure(case, group.title) for part in found.parts for group in part.groups for case in group.cases]
    low, high = found.scale
    return [
        Section(
            "Where it sees damage",
            f"Each picture with its heat map: the brighter, the more damage {detector.method} sees, on one scale for "
            f"all ({low:.3f} to {high:.3f}). The bright line is the true outline, where the data tell it. The score is "
            f"the picture's. Of {len(records)} pictures those with the lowest and the highest scores of either kind.",
            tuple(figures),
        )
    ]


def _figure(case: Case, title: str) -> Figure:
    return Figure(
        (
            Picture(_bytes(case.picture), f"{case.id}, {case.kind}"),
            Picture(_bytes(case.overlay), f"the same below its heat map, score {case.score:.3f}"),
        ),
        f"{title}: {case.kind}, score {case.score:.3f} ({case.id})",
        across=2,
    )


def _bytes(uri: str) -> bytes:
    return base64.b64decode(uri.partition(",")[2])
