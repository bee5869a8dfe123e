"""``clipgraft merging path``: what happens between two models."""

from __future__ import annotations

import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipgraft.cli.output import JsonFlag, emit

if TYPE_CHECKING:
    from clipgraft_merging.path.measuring import PathMeter, PathPoint
    from clipgraft_merging.path.sharpness import SharpnessSettings
    from clipgraft_merging.weights.engine import Inputs

TENTHS = ",".join(f"{k / 10:g}" for k in range(11))


def path(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model at 0: DIR, RUN or any reference.")],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model at 1, fine-tuned from BASE.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for path.json, path.csv, path.svg and path.png.")],
    data: Annotated[str, typer.Option(metavar="SRC", help="Data without a shift.")],
    ood: Annotated[str | None, typer.Option(metavar="SRC", help="Data under a shift.")] = None,
    on: Annotated[str, typer.Option(metavar="NAME[?K=V]", help="The evaluator.")] = "zero-shot",
    metric: Annotated[str | None, typer.Option(help="Its metric; by default the first it reports.")] = None,
    alphas: Annotated[str, typer.Option(metavar="A,A,...", help="Points between 0 and 1.")] = TENTHS,
    blocks: Annotated[bool, typer.Option("--blocks", help="Also a path per block, on which it alone moves.")] = False,
    rest: Annotated[float, typer.Option(min=0, max=1, help="Where the others stay meanwhile.")] = 1.0,
    stragglers: Annotated[
        int, typer.Option(min=0, help="With --blocks: also the path on which this many worst blocks are sparsified.")
    ] = 0,
    keep: Annotated[float, typer.Option(min=0, max=1, help="Share of their change that stays.")] = 0.1,
    rho: Annotated[
        float | None, typer.Option("--sharpness", metavar="RHO", help="Also each block's sharpness at every point.")
    ] = None,
    examples: Annotated[int, typer.Option(min=2, help="Samples for --sharpness, from --data.")] = 256,
    ascent: Annotated[int, typer.Option(min=1, help="Gradient steps for --sharpness.")] = 20,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 256,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes that decode images.")] = None,
    json: JsonFlag = False,
) -> None:
    """Measure models between BASE and MODEL, with and without a shift; tables and a figure.

    Barriers, per-block paths and sharpness are our operational reading of the straggler-layer paper, whose definitions
    were not public.
    """
    from clipgraft.config.schema import evaluator_named
    from clipgraft.errors import InputError
    from clipgraft.log import RunLog
    from clipgraft.registry import current
    from clipgraft_merging.path.measuring import PathMeter, blocks_of, measure_path
    from clipgraft_merging.path.report import PathReport, write_report
    from clipgraft_merging.path.sharpness import SharpnessSettings
    from clipgraft_merging.weights.engine import open_inputs

    try:
        points = sorted({0.0, *(float(a) for a in alphas.split(",")), 1.0})
    except ValueError:
        raise InputError(f"--alphas {alphas}: write numbers such as 0,0.25,0.5,1") from None
    if points[0] < 0 or points[-1] > 1:
        raise InputError(f"--alphas {alphas}: the path goes from 0 to 1; for more use clipgraft merging wise-ft")
    if stragglers and not blocks:
        raise InputError("--stragglers are found on the blocks' own paths; add --blocks")
    started = time.monotonic()
    with redirect_stdout(sys.stderr):  # whatever libraries print
        log = RunLog()
        inputs = open_inputs([model], base=base, registry=current())
        named = {"same": data} | ({} if ood is None else {"shifted": ood})
        meter = PathMeter(
            inputs.described,
            evaluator_named(on),
            data=named,
            registry=current(),
            metric=metric,
            batch_size=batch_size,
            workers=workers,
        )
        moving = blocks_of(inputs) if blocks or rho is not None else []
        found = measure_path(inputs, meter, alphas=points, blocks=moving if blocks else (), rest=rest, log=log)
        report = PathReport(base, model, meter.scored.metric or "", meter.scored.lower, found)
        more: dict[str, Any] = {}
        if stragglers:
            more["sparsified"] = _sparsified(inputs, meter, report, count=stragglers, keep=keep, points=points)
        if rho is not None:
            settings = SharpnessSettings(rho=rho, steps=ascent, examples=examples)
            more["sharpness"] = _sharpness(inputs, meter, found, moving, settings=settings, log=log)
        report = PathReport(base, model, report.metric, report.lower, found, more=more)
        written = write_report(report, out)
    if json:
        emit({"out": str(out), **report.as_dict(), "files": written, "seconds": round(time.monotonic() - started, 3)})
        return
    _show(report, out)


def _sparsified(
    inputs: Inputs, meter: PathMeter, report: Any, *, count: int, keep: float, points: list[float]
) -> dict[str, Any]:
    from clipgraft_merging.path.barrier import stragglers
    from clipgraft_merging.path.sparsify import SparsePath
    from clipgraft_merging.weights.engine import merge_state

    name = report.names[-1]  # under the shift, if it was measured
    worst = stragglers({b: v for b, v in report.barriers(name).items() if b}, count)
    rows = []
    for a in points:
        meter.fill(merge_state(inputs, SparsePath(alpha=a, blocks=worst, keep=keep)))
        rows.append({"alpha": a, **meter.scored.of(meter.encoder)})
    return {"blocks": worst, "keep": keep, "path": rows}


def _sharpness(
    inputs: Inputs,
    meter: PathMeter,
    found: list[PathPoint],
    moving: list[str],
    *,
    settings: SharpnessSettings,
    log: Any,
) -> dict[str, Any]:
    from clipgraft.errors import InputError
    from clipgraft_merging.path.barrier import spearman
    from clipgraft_merging.path.sharpness import block_sharpness
    from clipgraft_merging.weights.engine import merge_state
    from clipgraft_merging.weights.families import block_of
    from clipgraft_merging.weights.layouts import to_own
    from clipgraft_merging.wise_ft.interpolation import WiseFt

    held = dict(meter.encoder.image.named_parameters())
    names: dict[str, list[str]] = {block: [] for block in moving}
    for key in inputs.float_keys:
        own = to_own(key).removeprefix("image.")
        if own in held and block_of(key) in names:
            names[block_of(key)].append(own)
    names = {block: own for block, own in names.items() if own}
    if not names:
        raise InputError("--sharpness is that of the image tower's blocks, and none of them differs between the models")
    whole = [point for point in found if not point.block]
    rows = []
    with log.progress("sharpness", len(whole)) as bar:
        for point in whole:
            meter.fill(merge_state(inputs, WiseFt(alpha=point.alpha)))
            source = meter.scored.source("same")
            rows.append({"alpha": point.alpha, **block_sharpness(meter.encoder, source, names, settings=settings)})
            bar.advance(note=f"{point.alpha:g}")
    data = list(whole[0].scores)
    correlations = {
        block: {name: spearman([r[block] for r in rows], [p.scores[name] for p in whole]) for name in data}
        for block in names
    }
    return {"rho": settings.rho, "points": rows, "spearman_with_metric": correlations}


def _show(report: Any, out: Path) -> None:
    from clipgraft.cli.output import table

    rows = [p for p in report.points if not p.block]
    table([{"alpha": f"{p.alpha:g}", **{n: f"{p.scores[n]:.4f}" for n in report.names}} for p in rows],
          ["alpha", *report.names])  # fmt: skip
    for name in report.names:
        barriers = report.barriers(name)
        print(f"{name}: best at alpha {report.best(name):g}, barrier {barriers['']:+.4f} in {report.metric}")
        worst = sorted((b for b in barriers if b), key=lambda b: -barriers[b])[:3]
        if worst:
            print(f"  blocks with the highest barriers: {', '.join(f'{b} {barriers[b]:+.4f}' for b in worst)}")
    print(f"tables and figure: {out}")
