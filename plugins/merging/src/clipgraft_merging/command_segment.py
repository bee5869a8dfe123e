"""``clipgraft merging segment``: pictures labelled by words, of one or several models side by side."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipgraft.cli.output import JsonFlag, emit

if TYPE_CHECKING:
    from clipgraft_merging.segmentation.segment import Asked


class Background(StrEnum):
    """What pixels may be beside the classes."""

    none = "none"
    threshold = "threshold"
    class_ = "class"


class Dense(StrEnum):
    """Which patch embeddings."""

    last = "last"
    value = "value"


class Shape(StrEnum):
    """How pictures are resized."""

    keep = "keep"
    squash = "squash"


def segment(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Runs, exports or any models, side by side.")],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Write label maps, overlays, sheet.png and index.html here.")
    ],
    images: Annotated[Path | None, typer.Option(metavar="DIR", help="Pictures to segment.")] = None,
    data: Annotated[str | None, typer.Option(metavar="SRC", help="Or a data source; its masks are shown too.")] = None,
    classes: Annotated[
        str | None, typer.Option(metavar="A,B,...|file:FILE", help="What to look for; by default what the data names.")
    ] = None,
    templates: Annotated[
        str | None, typer.Option(metavar="SET|file:FILE", help="Prompts: openai-imagenet, simple, or a file.")
    ] = None,
    background: Annotated[Background, typer.Option(help="Pixels of no class: none, unsure ones, or by words.")] = (
        Background.none
    ),
    threshold: Annotated[float, typer.Option(min=0, max=1, help="For threshold: probability of the best class.")] = 0.5,
    background_names: Annotated[
        str, typer.Option(metavar="A,B,...", help="For class: words for what is no class.")
    ] = "background",
    dense: Annotated[Dense, typer.Option(help="The last tokens, or the last block's values (MaskCLIP).")] = Dense.last,
    size: Annotated[
        int | None, typer.Option(min=1, metavar="PX", help="Shorter side at which pictures are read.")
    ] = None,
    shape: Annotated[Shape, typer.Option(help="Keep the aspect ratio, or make pictures square.")] = Shape.keep,
    refine: Annotated[bool, typer.Option("--refine", help="Sharpen with the model's own masks where it has any.")] = (
        False
    ),
    sam: Annotated[str | None, typer.Option(metavar="REF", help="Sharpen with this SAM; implies --refine.")] = None,
    most: Annotated[int, typer.Option(min=1, help="Segment so many pictures at most.")] = 64,
    json: JsonFlag = False,
) -> None:
    """Label every pixel, e.g. clipgraft merging segment toyworld/clip --images photos --classes cat,dog --out found"""
    from clipgraft.config.load import validate
    from clipgraft.data import open_source
    from clipgraft.distributed import make_accelerator
    from clipgraft.encoders import load
    from clipgraft.errors import InputError
    from clipgraft.log import RunLog
    from clipgraft.registry import current
    from clipgraft_merging.segmentation import segment as work
    from clipgraft_merging.segmentation.labelling import ReadingConfig
    from clipgraft_merging.segmentation.refinement import RefinementConfig
    from clipgraft_merging.segmentation.vocabulary import VocabularyConfig

    if (images is None) == (data is None):
        raise InputError("give either --images DIR or --data SRC, which says what to segment")
    if len({work.slug(model) for model in models}) < len(models):
        raise InputError("two models have one name; list each once")
    words: dict[str, object] = {"background": background.value, "threshold": threshold}
    words |= {"background_names": _listed(background_names)}
    words |= {} if classes is None else {"classes": classes if classes.startswith("file:") else _listed(classes)}
    words |= {} if templates is None else {"templates": templates}
    asked: Asked = work.Asked(
        validate(ReadingConfig, {"dense": dense.value, "size": size, "shape": shape.value}, where="segment"),
        validate(VocabularyConfig, words, where="segment"),
        validate(RefinementConfig, {"sam": sam}, where="segment") if refine or sam else None,
    )
    with redirect_stdout(sys.stderr):  # whatever libraries print
        registry, log = current(), RunLog()
        source = open_source(f"folder:{images}" if data is None else data, registry=registry)
        if hasattr(source, "patterns"):
            raise InputError(f"{data} holds minimal pairs; segmentation needs single pictures")
        device = make_accelerator("fp32").device
        opened = [(model, load(_export(model), registry=registry).eval().to(device)) for model in models]
        found = work.segment(opened, source, out, asked=asked, most=most, log=log)
    if json:
        emit(found)
        return
    for picture in found["pictures"][:20]:
        for model, shares in picture["labels"].items():
            told = ", ".join(f"{name} {share:.0%}" for name, share in list(shares.items())[:5]) or "nothing"
            print(f"{picture['id']}  {model}: {told}")
    if found["unreadable"]:
        print(f"{found['unreadable']} pictures can't be read", file=sys.stderr)
    print(f"{len(found['pictures'])} pictures. Look at {out / 'index.html'} or {out / 'sheet.png'}.")


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _export(model: str) -> str:
    """A run's export; anything else as it is."""
    folder = Path(model).expanduser() / "export"
    return str(folder) if (folder / "clipgraft.json").is_file() else model
