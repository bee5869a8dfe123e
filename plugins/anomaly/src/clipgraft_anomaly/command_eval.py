"""``clipgraft anomaly eval``: how well a detector finds damage, per kind of part and in the mean."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipgraft.cli.output import JsonFlag, SetOption, emit

if TYPE_CHECKING:
    from clipgraft.log import RunLog
    from clipgraft.registry import Registry
    from clipgraft_anomaly.evaluate import Report
    from clipgraft_anomaly.same_data import DataRecord

COLUMNS = {
    "image_auroc": "image\nAUROC",
    "image_ap": "image\nAP",
    "image_f1_max": "image\nF1*",
    "pixel_auroc": "pixel\nAUROC",
    "pixel_ap": "pixel\nAP",
    "pixel_f1_max": "pixel\nF1*",
    "aupro": "AUPRO\nexact",
    "aupro_legacy": "AUPRO\nlegacy",
}


def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Run or export with a detector; with --method, any model.")
    ],
    data: Annotated[
        str, typer.Option(metavar="SRC", help="mvtec:DIR, visa:DIR, folder:DIR, csv:FILE or any inspection data.")
    ],
    method: Annotated[
        str | None, typer.Option(metavar="NAME", help="A detector that needs no training: prompts or winclip.")
    ] = None,
    set_: SetOption = None,
    object_: Annotated[str | None, typer.Option("--object", metavar="NAME", help="Only this kind of part.")] = None,
    class_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="What prompts call the parts, instead of their own names.")
    ] = None,
    allow_same: Annotated[
        bool, typer.Option("--allow-same", help="Measure even on pictures that the detector was trained on.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write results, a row per picture, and a page here.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures per forward pass.")] = 8,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that decode pictures; by default as many as are worth it.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Measure a detector, e.g. clipgraft anomaly eval runs/anomalyclip-1 --data mvtec:mvtec_ad --json"""
    from clipgraft.config.load import assign
    from clipgraft.distributed import make_accelerator
    from clipgraft.errors import InputError
    from clipgraft.log import RunLog
    from clipgraft.registry import current
    from clipgraft_anomaly.detector import open_detector
    from clipgraft_anomaly.evaluate import evaluate_detector
    from clipgraft_anomaly.inspection import open_inspection
    from clipgraft_anomaly.report_cases import gallery
    from clipgraft_anomaly.report_page import write_page
    from clipgraft_anomaly.same_data import refuse_same

    settings: dict[str, object] = {}
    for override in set_ or ():
        assign(settings, override)
    if settings and method is None:
        raise InputError("--set changes a method without training; name it with --method, or train anew for a detector")
    with redirect_stdout(sys.stderr):  # whatever libraries print
        log, registry = RunLog(), current()
        chosen = data if object_ is None else f"{data}{'&' if '?' in data else '?'}object={object_}"
        source = open_inspection(chosen, registry=registry)
        detector = open_detector(model, registry=registry, method=method, settings=settings)
        trained = getattr(detector, "trained_on", None)
        if trained is None and method is None:
            trained = _of_run(Path(model), registry=registry, log=log)
        shared = refuse_same(trained, source, allow_same=allow_same, log=log)
        detector.to(make_accelerator("fp32").device)
        report = evaluate_detector(detector, source, batch_size=batch_size, log=log, name=class_name, workers=workers)
        document = {"model": model, "data": chosen, "method": detector.method, "trained_on_test": shared}
        document |= report.as_dict()
        for note in report.notes:
            log.info(note)
        if out is not None:
            _write(out, report, document)
            shown = gallery(detector, source, report, name=class_name, batch_size=batch_size, log=log)
            write_page(out / "report.html", report, document, shown)
    emit(document) if json else _show(report, title=f"{detector.method} on {chosen}")


def _of_run(folder: Path, *, registry: Registry, log: RunLog) -> DataRecord | None:
    """The training data of the run that ``folder`` is or that it belongs to, if they can still be read."""
    from clipgraft.config.load import load_run
    from clipgraft.errors import ClipgraftError
    from clipgraft_anomaly.inspection import open_inspection
    from clipgraft_anomaly.same_data import DataRecord

    run = next((f for f in (folder, folder.absolute().parent) if (f / "status.json").is_file()), None)
    if run is None:
        log.info(f"{folder} doesn't say what it was trained on; make sure that it was other data")
        return None
    try:
        reference = load_run(run, registry=registry)[1].data.from_
        return DataRecord.of(reference, open_inspection(reference, registry=registry), log=log)
    except (ClipgraftError, OSError) as error:
        log.info(f"what {run} was trained on can't be read ({error}); make sure that it was other data")
        return None


def _write(out: Path, report: Report, document: dict[str, object]) -> None:
    """results.json, evaluation.json with a Parquet file, curves.json and curves.svg."""
    from clipgraft import files
    from clipgraft.evaluation import records
    from clipgraft_anomaly.curve_plot import curves_svg

    records.save(out, {"anomaly/inspection": report.evaluation()})
    files.write_json(out / "results.json", document)
    curves = {part.object: {k: {"x": x, "y": y} for k, (x, y) in part.curves.items()} for part in report.parts}
    files.write_json(out / "curves.json", curves)
    if drawn := curves_svg(report):
        files.write_text(out / "curves.svg", drawn)


def _show(report: Report, *, title: str) -> None:
    """A row per kind of part and their mean."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("part", "good +\nbad", title=escape(title), box=SIMPLE, padding=(0, 1, 0, 0))
    for head in COLUMNS.values():
        table.add_column(head, justify="right")
    for part in report.parts:
        cells = [_cell(part.metrics[name]) for name in COLUMNS]
        table.add_row(escape(part.object), f"{part.counts['normal']} + {part.counts['anomalous']}", *cells)
    table.add_section()
    mean = report.mean
    table.add_row("mean", "", *(_cell(mean[name]) for name in COLUMNS))
    console = Console(highlight=False)
    console.print(table)
    console.print("* largest F1 of any threshold on these very pictures: an oracle, no promise")
    for name, parts in report.undefined.items():
        console.print(escape(f"{name} is undefined for {len(parts)} of {len(report.parts)}: {', '.join(parts[:5])}"))


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
