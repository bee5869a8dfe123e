"""``clipgraft anomaly predict``: any folder of pictures, each with a score, a map, a mask and an overlay."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipgraft.cli.output import JsonFlag, SetOption, emit

if TYPE_CHECKING:
    from clipgraft.registry import Registry
    from clipgraft_anomaly.detector import Detector
    from clipgraft_anomaly.predict import Predicted
    from clipgraft_anomaly.predict_overlays import Limits
    from clipgraft_anomaly.tiling import Tiling

LISTED = 20
"""Unreadable pictures, and highest scores, that are named in the output."""


class MapName(StrEnum):
    """Map files."""

    png = "png"
    npy = "npy"


ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Run or export with a detector; with --method, any model.")
]
MethodOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="A detector that needs no training: prompts or winclip.")
]
ClassNameOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="What prompts call the part; methods that name no object ignore it.")
]
TileOption = Annotated[
    int | None, typer.Option(min=1, metavar="PX", help="Cut larger pictures into tiles of so many pixels a side.")
]
OverlapOption = Annotated[
    int | None, typer.Option(min=0, metavar="PX", help="Pixels that tiles share; by default a quarter of a tile.")
]


def predict(
    model: ModelArgument,
    images: Annotated[Path, typer.Option(metavar="DIR", help="Pictures, also in folders below; no labels needed.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Write predictions.jsonl, maps, masks and overlays here.")],
    class_name: ClassNameOption = None,
    threshold: Annotated[
        str | None,
        typer.Option(metavar="VALUE|stored|FILE", help="Call a picture anomalous from this score on."),
    ] = None,
    pixel_threshold: Annotated[
        float | None, typer.Option(metavar="VALUE", help="Write masks of what isn't below this map value.")
    ] = None,
    method: MethodOption = None,
    set_: SetOption = None,
    tile: TileOption = None,
    overlap: OverlapOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures or tiles per forward pass.")] = 8,
    keep_size: Annotated[
        bool, typer.Option("--keep-size/--model-size", help="Maps at the picture's size, or at the detector's.")
    ] = True,
    maps: Annotated[MapName, typer.Option(help="16-bit PNG, or float16 for numpy.")] = MapName.png,
    overlays: Annotated[bool, typer.Option("--overlays/--no-overlays", help="Heat maps on the pictures.")] = True,
    scale: Annotated[
        str | None, typer.Option(metavar="LOW,HIGH", help="Ends of the overlays' colours, to compare folders.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what an earlier call left in DIR.")] = False,
    json: JsonFlag = False,
) -> None:
    """Inspect pictures, e.g. clipgraft anomaly predict runs/anomalyclip-1 --images photos --out found"""
    from clipgraft.distributed import make_accelerator
    from clipgraft.log import RunLog
    from clipgraft.registry import current
    from clipgraft_anomaly.predict import folder_source
    from clipgraft_anomaly.predict import predict as run
    from clipgraft_anomaly.thresholds import identity

    ends, tiling = _ends(scale), tiling_of(tile, overlap)
    with redirect_stdout(sys.stderr):  # whatever libraries print
        folder_source(images, but=out)  # before a model is loaded
        detector = opened(model, registry=current(), method=method, set_=set_)
        sha256 = identity(detector, tiling)
        limits = _limits(threshold, pixel_threshold, model=model, sha256=sha256)
        found = run(
            detector.to(make_accelerator("fp32").device),
            images,
            out,
            model=model,
            sha256=sha256,
            limits=limits,
            name=class_name,
            tiling=tiling,
            maps=maps.value,
            keep_size=keep_size,
            overlays=overlays,
            scale=ends,
            batch_size=batch_size,
            resume=resume,
            log=RunLog(),
        )
    emit(_document(found, out)) if json else _show(found, out)


def opened(model: str, *, registry: Registry, method: str | None, set_: list[str] | None) -> Detector:
    """The detector that the options name."""
    from clipgraft.config.load import assign
    from clipgraft.errors import InputError
    from clipgraft_anomaly.detector import open_detector

    settings: dict[str, object] = {}
    for override in set_ or ():
        assign(settings, override)
    if settings and method is None:
        raise InputError("--set changes a method without training; name it with --method, or train anew for a detector")
    return open_detector(model, registry=registry, method=method, settings=settings)


def tiling_of(tile: int | None, overlap: int | None) -> Tiling | None:
    """The tiles that the options name; None for whole pictures."""
    from clipgraft.errors import InputError
    from clipgraft_anomaly.tiling import Tiling

    if tile is None:
        if overlap is not None:
            raise InputError("--overlap is that of tiles; give --tile too, such as --tile 1024")
        return None
    return Tiling(tile, tile // 4 if overlap is None else overlap)


def _limits(threshold: str | None, pixel: float | None, *, model: str, sha256: str) -> Limits:
    """Given numbers, or those of a file that was made for this very detector."""
    from clipgraft.errors import InputError
    from clipgraft_anomaly.predict_overlays import Limits
    from clipgraft_anomaly.thresholds import check_model, place, read_thresholds

    if threshold is None:
        return Limits(None, pixel, "given" if pixel is not None else "")
    try:
        return Limits(float(threshold), pixel, "given")
    except ValueError:
        pass
    path = place(model) if threshold == "stored" else Path(threshold)
    if path is None:
        raise InputError(
            f"{model} is no run or export, so nothing is stored with it; give --threshold FILE that clipgraft anomaly "
            "threshold ... --out FILE wrote, or a number"
        )
    if threshold != "stored" and not path.is_file():
        raise InputError(f"--threshold {threshold} is neither a number nor a file; give one of them, or stored")
    stored = read_thresholds(path)
    check_model(stored, sha256, path=path)
    own = stored.pixel.value if stored.pixel is not None else None
    return Limits(stored.score.value, own if pixel is None else pixel, stored.source())


def _ends(scale: str | None) -> tuple[float, float] | None:
    from clipgraft.errors import InputError

    if scale is None:
        return None
    try:
        low, high = map(float, scale.split(","))
    except ValueError:
        raise InputError(f"--scale {scale} is no pair of numbers; give LOW,HIGH such as 0.3,0.7") from None
    if not low < high:
        raise InputError(f"--scale {scale} must rise from LOW to HIGH; give such as 0.3,0.7")
    return low, high


def _document(found: Predicted, out: Path) -> dict[str, object]:
    header, unreadable = found.header, found.unreadable
    return {
        "out": str(out),
        "predictions": str(out / "predictions.jsonl"),
        "pictures": len(found.lines),
        "new": found.new,
        "unreadable": len(unreadable),
        "unreadable_files": [{"file": line["file"], "error": line["error"]} for line in unreadable[:LISTED]],
        "anomalous": header["counts"].get("anomalous"),
        "thresholds": header["thresholds"],
        "scale": header["scale"],
        "method": header["detector"]["method"],
        "model_sha256": header["model_sha256"],
        "seconds": round(found.seconds, 2),
        "per_second": round(found.new / found.seconds, 2) if found.new else None,
    }


def _show(found: Predicted, out: Path) -> None:
    """The highest scores, and what could not be read."""
    from clipgraft.cli.output import table

    first = sorted(found.scored, key=lambda line: -line["score"])[:LISTED]
    columns = ["score", "map_max", *(["label"] if first and "label" in first[0] else []), "file"]
    if first:
        table([{**line, **{k: f"{line[k]:.4f}" for k in ("score", "map_max")}} for line in first], columns)
    if len(found.scored) > len(first):
        print(f"... and {len(found.scored) - len(first)} with lower scores")
    for line in found.unreadable[:LISTED]:
        print(f"can't be read: {line['file']}: {line['error']}")
    told = f"{len(found.scored)} pictures scored"
    if (count := found.header["counts"].get("anomalous")) is not None:
        told += f", {count} anomalous"
    if found.unreadable:
        told += f"; {len(found.unreadable)} can't be read"
    if source := found.header["thresholds"]["source"]:
        told += f"; threshold {source}"
    print(f"{told}. Lines in {out / 'predictions.jsonl'}, maps and pictures beside it.")
