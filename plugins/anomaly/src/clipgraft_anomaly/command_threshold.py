"""``clipgraft anomaly threshold``: choose from labelled pictures from which score on a part counts as damaged."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipgraft.cli.output import JsonFlag, SetOption, emit
from clipgraft_anomaly.command_predict import (
    ClassNameOption,
    MethodOption,
    ModelArgument,
    OverlapOption,
    TileOption,
    opened,
    tiling_of,
)

if TYPE_CHECKING:
    from clipgraft_anomaly.thresholds import Threshold, Thresholds


class RuleName(StrEnum):
    """How a threshold is chosen."""

    quantile = "quantile"
    f1 = "f1"


def threshold(
    model: ModelArgument,
    data: Annotated[
        str, typer.Option(metavar="REF", help="Labelled pictures of a named split, e.g. parts:DIR?split=train.")
    ],
    rule: Annotated[
        RuleName, typer.Option(help="A quantile of normal pictures, or the best F1, which needs anomalous ones too.")
    ] = RuleName.quantile,
    quantile: Annotated[
        float, typer.Option(min=0.5, max=1.0, help="Share of normal pictures that stay below, with the rule quantile.")
    ] = 0.995,
    pixel: Annotated[bool, typer.Option("--pixel", help="Also a threshold for maps, for masks.")] = False,
    class_name: ClassNameOption = None,
    method: MethodOption = None,
    set_: SetOption = None,
    tile: TileOption = None,
    overlap: OverlapOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures or tiles per forward pass.")] = 8,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write here; by default thresholds.json in the export.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Choose a threshold, e.g. clipgraft anomaly threshold runs/anomalyclip-1 --data "parts:DIR?split=train" """
    from clipgraft.distributed import make_accelerator
    from clipgraft.errors import InputError
    from clipgraft.log import RunLog
    from clipgraft.registry import current
    from clipgraft_anomaly.choose_threshold import choose, split_of
    from clipgraft_anomaly.inspection import open_inspection
    from clipgraft_anomaly.thresholds import identity, place, write_thresholds

    split, tiling = split_of(data), tiling_of(tile, overlap)
    path = out or place(model)
    if path is None:
        raise InputError(f"{model} is no run or export that could keep a threshold; say where with --out FILE")
    with redirect_stdout(sys.stderr):  # whatever libraries print
        log, registry = RunLog(), current()
        source = open_inspection(data, registry=registry, log=log)
        detector = opened(model, registry=registry, method=method, set_=set_)
        sha256 = identity(detector, tiling)
        found = choose(
            detector.to(make_accelerator("fp32").device),
            source,
            data=data,
            split=split,
            model=model,
            sha256=sha256,
            rule=rule.value,
            quantile=quantile,
            pixel=pixel,
            name=class_name,
            tiling=tiling,
            batch_size=batch_size,
            log=log,
        )
        write_thresholds(path, found)
    emit({"file": str(path), **found.model_dump(mode="json", by_alias=True)}) if json else _show(found, path)


def _show(found: Thresholds, path: Path) -> None:
    print(f"score {_line(found.score)}")
    if found.pixel is not None:
        print(f"pixel {_line(found.pixel)}")
    print(f"{path}: {found.source().removeprefix('stored: ')}")


def _line(one: Threshold) -> str:
    told = f"threshold {one.value:.6g}"
    if one.false_alarms is not None:
        told += f"; {100 * one.false_alarms:.2f} % of {one.normal} normal"
    if one.found is not None:
        told += f" and {100 * one.found:.2f} % of {one.anomalous} anomalous"
    return f"{told} {one.of} reach it" + (f" (F1 {one.f1:.4f})" if one.f1 is not None else "")
