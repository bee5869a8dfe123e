"""``clipgraft classify``: which of some words fits each image best."""

from __future__ import annotations

import sys
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from clipgraft.cli.evaluate import Precision
from clipgraft.cli.output import JsonFlag, emit
from clipgraft_embedding.embed_command import (
    BatchOption,
    ModelArgument,
    PrecisionOption,
    WorkersOption,
    reference,
)


def classify(
    model: ModelArgument,
    images: Annotated[str, typer.Option(metavar="DIR|SRC", help="A folder at any depth, an image, or data.")],
    labels: Annotated[str | None, typer.Option(metavar="A,B,...", help="The classes.")] = None,
    labels_file: Annotated[Path | None, typer.Option(metavar="FILE", help="The classes, one per line.")] = None,
    templates: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="Prompts: plain (1), simple (7), openai (80), or one per line.")
    ] = "plain",
    top: Annotated[int, typer.Option(min=1, help="Labels per image.")] = 3,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Ends in .csv, .jsonl or .parquet.")] = None,
    batch_size: BatchOption = None,
    workers: WorkersOption = None,
    precision: PrecisionOption = Precision.fp32,
    json: JsonFlag = False,
) -> None:
    """Sort images into classes, e.g. clipgraft classify toyworld/clip --images photos --labels cat,dog"""
    from clipgraft.errors import InputError

    stdout = sys.stdout  # progress bars take sys.stdout over while they show
    if (labels is None) == (labels_file is None):
        raise InputError("give the classes once: --labels cat,dog or --labels-file FILE with one per line")
    with redirect_stdout(sys.stderr), ExitStack() as stack:  # whatever libraries print
        from clipgraft.log import RunLog
        from clipgraft.registry import current
        from clipgraft_embedding.classify import Classifier, open_images, read_lines, read_templates
        from clipgraft_embedding.classify import classify as run
        from clipgraft_embedding.precision import settle
        from clipgraft_embedding.processes import on_device
        from clipgraft_embedding.tower import usual_batch_size
        from clipgraft_embedding.verdict_file import verdict_file

        names = [name.strip() for name in labels.split(",") if name.strip()] if labels is not None else []
        names = names or (list(read_lines(labels_file, what="label")) if labels_file else [])
        top = min(top, max(len(names), 1))
        log, prompts = RunLog(), read_templates(templates)
        write: Any = stack.enter_context(verdict_file(out, top=top)) if out else None
        encoder = on_device(model, registry=current())
        classifier, source = Classifier(encoder, names, prompts), open_images(images)
        if same := classifier.alike():
            shown = ", ".join(same[:6]) + (f" and {len(same) - 6} more" if len(same) > 6 else "")
            log.info(f"{reference(model)} reads each of these labels as another one; choose words it knows: {shown}")
        size = batch_size or usual_batch_size(encoder)
        chosen = settle(encoder, source, kind="images", asked=precision.value, most=size, log=log)
        bad: list[str] = []
        verdicts, count = [], 0
        shown = write is None and not json
        for verdict in run(
            classifier,
            source,
            top=top,
            batch_size=size,
            workers=workers,
            precision=chosen.precision,
            bad=bad,
            log=None if shown else log,
        ):
            count += 1
            if write is not None:
                write(verdict)
            elif json:
                verdicts.append(verdict.as_dict())
            else:
                pairs = zip(verdict.labels, verdict.probabilities, strict=True)
                cells = "  ".join(f"{label:<{max(map(len, names))}} {p:.4f}" for label, p in pairs)
                print(f"{verdict.id}  {cells}", file=stdout, flush=True)
        if not count:
            raise InputError(f"{images} has no image that can be read: {'; '.join(bad[:3])}")
    if json:
        where: dict[str, Any] = {"out": str(out)} if out else {"results": verdicts}
        about = {"model": reference(model), "labels": names, "precision": chosen.precision}
        emit({**about, "max_cosine_error": chosen.error, "classified": count, "unreadable": bad, **where})
        return
    if out:
        print(f"{out}: {count} images")
    for reason in bad:
        print(f"unreadable: {reason}", file=sys.stderr)
