"""``clipgraft anomaly reject``: which of some classes a picture shows, or that it shows none of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipgraft.cli.output import JsonFlag

if TYPE_CHECKING:
    from clipgraft.data.images import ImageFiles
    from clipgraft.data.loader import BadSamples
    from clipgraft.encoders.base import Encoder
    from clipgraft_anomaly.clipn.rejection import Classes, Rule

UNKNOWN = "unknown"


class RuleName(StrEnum):
    """CLIPN's two rules."""

    atd = "atd"
    ctw = "ctw"


def reject(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Run or export of clipgraft run clipn.")],
    images: Annotated[Path, typer.Option(metavar="DIR", help="Pictures at any depth, or one picture.")],
    labels: Annotated[Path | None, typer.Option(metavar="FILE", help="The known classes, one per line.")] = None,
    classes: Annotated[str | None, typer.Option(metavar="A,B,...", help="The known classes.")] = None,
    rule: Annotated[
        RuleName, typer.Option(help="atd weighs all classes, ctw asks the nearest one; neither needs a threshold.")
    ] = RuleName.atd,
    template: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help='Prompt with one {}; may be repeated. ["a photo of a {}."]')
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures per forward pass.")] = 64,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that decode pictures; by default as many as are worth it.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Sort pictures or reject them, e.g. clipgraft anomaly reject runs/clipn-1 --images photos --classes cat,dog

    With --json a line per picture: image, class (or "unknown"), nearest, probability, unknown, rule; or image, error.
    """
    import json as text_of

    from clipgraft.errors import InputError

    stdout = sys.stdout
    names = _names(labels, classes)
    with redirect_stdout(sys.stderr):  # whatever libraries print
        from clipgraft.data.loader import BadSamples
        from clipgraft.distributed import make_accelerator
        from clipgraft.encoders import load
        from clipgraft.registry import current
        from clipgraft_anomaly.clipn.current_branch import branch_for
        from clipgraft_anomaly.clipn.rejection import known_classes

        source = _pictures(images)
        folder = Path(model) / "export" if (Path(model) / "export").is_dir() else Path(model)
        encoder = load(str(folder) if folder.is_dir() else model, registry=current())
        encoder = encoder.to(make_accelerator("fp32").device).eval().requires_grad_(False)
        branch = branch_for(encoder, registry=current())
        if branch is None:
            raise InputError(f"{model} has no branch that says no; give a run or export of clipgraft run clipn")
        known = known_classes(encoder, branch, names, template or (), batch_size=batch_size)
        bad = BadSamples(len(source))
        count, rejected, width = 0, 0, max(len(n) for n in (*names, UNKNOWN))
        for row in _judged(
            encoder, known, source, bad, rule=rule.value, scale=branch.scale, batch_size=batch_size, workers=workers
        ):
            count, rejected = count + 1, rejected + (row["class"] == UNKNOWN)
            line = f"{row['class']:<{width}}  unknown {row['unknown']:.4f}  nearest {row['nearest']}  {row['image']}"
            print(text_of.dumps(row, ensure_ascii=False) if json else line, file=stdout, flush=True)
        for index in sorted(bad.indices):
            name = source.ids[index]
            told = next((line for line in bad.first if line.startswith(f"{name}: ")), "")  # reasons of the first ten
            why = told.removeprefix(f"{name}: ") or "can't be read"
            line = text_of.dumps({"image": name, "error": why}, ensure_ascii=False) if json else f"{name}: {why}"
            print(line, file=stdout if json else sys.stderr)
        if not count:
            raise InputError(f"{images} has no picture that can be read: {'; '.join(bad.first[:3])}")
        print(f"{count} pictures, {rejected} unknown, {bad.count} unreadable", file=sys.stderr)


def _names(labels: Path | None, classes: str | None) -> list[str]:
    """The known classes, each once."""
    from clipgraft.errors import InputError

    if (labels is None) == (classes is None):
        raise InputError("give the known classes once: --classes cat,dog or --labels FILE with one per line")
    if labels is not None:
        try:
            lines = labels.read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise InputError(f"{labels} can't be read ({reason}); give a text file with one class per line") from None
    else:
        lines = (classes or "").split(",")
    names = [name.strip() for name in lines if name.strip()]
    if not names:
        raise InputError(f"{labels or '--classes'} names no class; name one or more")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"the class {twice!r} is named twice; name it once")
    if UNKNOWN in names:
        raise InputError(
            f"a class can't be called {UNKNOWN!r}, which is the answer for pictures of no class; rename it"
        )
    return names


def _pictures(images: Path) -> ImageFiles:
    """Every picture below a folder, or one file; none is decoded here."""
    from clipgraft.data.images import MAX_PIXELS, SUFFIXES, ImageFiles
    from clipgraft.errors import InputError

    if images.is_file():
        root, found = images.resolve().parent, [images.name]
    elif images.is_dir():
        root = images.resolve()
        paths = (p.relative_to(root) for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        found = sorted(p.as_posix() for p in paths if not any(part.startswith(".") for part in p.parts))
    else:
        raise InputError(f"there is no folder or picture {images}; give --images DIR")
    if not found:
        raise InputError(f"{images} holds no picture; their names end in {', '.join(sorted(SUFFIXES))}")
    return ImageFiles(str(images), root, dict.fromkeys(found, ()), {}, (), MAX_PIXELS)


def _judged(
    encoder: Encoder,
    known: Classes,
    source: ImageFiles,
    bad: BadSamples,
    *,
    rule: Rule,
    scale: float,
    batch_size: int,
    workers: int | None,
) -> Iterator[dict[str, Any]]:
    """One record per picture that can be read."""
    import torch
    from torch.nn import functional as F

    from clipgraft.data.loader import evaluation_batches
    from clipgraft.data.reading import stack_images
    from clipgraft_anomaly.clipn.rejection import judge

    parameter = next(encoder.image.parameters())
    for batch in evaluation_batches(
        source, preprocess=encoder.preprocess, batch_size=batch_size, bad=bad, workers=workers
    ):
        with torch.no_grad():
            found = encoder.image(encoder.preprocess.normalize(stack_images(batch).to(parameter))).pooled
        judged = judge(F.normalize(found.float(), dim=-1).cpu(), known.yes, known.no, scale=scale)
        best, top, out = judged.best.tolist(), judged.p.amax(1).tolist(), judged.rejected(rule).tolist()
        for sample, k, p, q, no in zip(batch, best, top, judged.unknown(rule).tolist(), out, strict=True):
            name = known.names[k]
            yield {"image": sample.id, "class": UNKNOWN if no else name, "nearest": name, "probability": round(p, 6),
                   "unknown": round(q, 6), "rule": rule}  # fmt: skip
