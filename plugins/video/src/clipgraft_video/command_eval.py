"""``clipgraft video eval``: accuracy over splits, base-to-novel, retrieval; with the rule against leaks."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipgraft.cli.output import JsonFlag, emit
from clipgraft_video.command_classify import BatchOption, ModelArgument

if TYPE_CHECKING:
    from clipgraft.evaluation.base import Evaluation
    from clipgraft.log import RunLog
    from clipgraft.registry import Registry
    from clipgraft_video.model import VideoModel


class Protocol(StrEnum):
    """What is reported."""

    accuracy = "accuracy"
    base_to_novel = "base-to-novel"
    retrieval = "retrieval"


def evaluate(
    model: ModelArgument,
    data: Annotated[list[str], typer.Option(metavar="REF", help="Videos, e.g. video:LIST?size=224; one per split.")],
    protocol: Annotated[
        Protocol,
        typer.Option(
            help="accuracy: zero-shot, few-shot or supervised, mean over splits; base-to-novel: both halves of the "
            "classes with their harmonic mean; retrieval: captions."
        ),
    ] = Protocol.accuracy,
    train: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REF", help="What the model was trained on, if MODEL is no run; videos of it are refused."
        ),
    ] = None,
    template: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Prompt with one {}; may be repeated. Default: the data's.")
    ] = None,
    views: Annotated[int, typer.Option(min=1, help="Clips per video, spread over time.")] = 1,
    crops: Annotated[int, typer.Option(help="Squares per clip: 1 or 3.")] = 1,
    batch_size: BatchOption = 4,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write a row per video here (Parquet).")] = None,
    json: JsonFlag = False,
) -> None:
    """Measure on videos, e.g. clipgraft video eval runs/vifi-clip-1 --data "video:test1.txt?root=DIR" """
    from clipgraft.distributed import make_accelerator
    from clipgraft.errors import InputError
    from clipgraft.evaluation import records
    from clipgraft.log import RunLog
    from clipgraft.registry import current
    from clipgraft_video.command_classify import opened_model

    if crops not in (1, 3):
        raise InputError(f"crops is 1 or 3, not {crops}")
    if protocol is Protocol.retrieval and (views, crops) != (1, 1):
        raise InputError("retrieval takes one view; leave out --views and --crops")
    registry, log = current(), RunLog()
    with redirect_stdout(sys.stderr):  # whatever libraries print
        references = _parts(data, protocol)
        _refuse_leaks(model, references, train, registry=registry)
        opened = opened_model(model, registry=registry).to(make_accelerator("fp32").device)
        found = {
            reference: _one(
                opened,
                reference,
                protocol=protocol,
                template=template or [],
                views=views,
                crops=crops,
                batch_size=batch_size,
                registry=registry,
                log=log,
            )
            for reference in references
        }
        if out is not None:
            records.save(out, found)
    summary = _summary(found, data, protocol)
    results = {name: e.summary()["metrics"] for name, e in found.items()}
    if json:
        return emit({"model": model, "protocol": protocol.value, "results": results, "summary": summary})
    for name, metrics in results.items():
        print(f"{name}: {', '.join(f'{key} {value:.4f}' for key, value in metrics.items())}")
    for key, value in summary.items():
        print(f"{key} {value:.4f}")


def _parts(data: Sequence[str], protocol: Protocol) -> list[str]:
    """Base-to-novel splits every reference in two."""
    if protocol is not Protocol.base_to_novel:
        return list(data)
    return [f"{ref}{'&' if '?' in ref else '?'}half={half}" for ref in data for half in ("base", "novel")]


def _refuse_leaks(model: str, references: Sequence[str], train: Sequence[str] | None, *, registry: Registry) -> None:
    """What was trained on comes from the run's own configuration, or from --train."""
    from clipgraft.config.load import load_run
    from clipgraft.data import open_source
    from clipgraft.data.base import entry_of
    from clipgraft.errors import ClipgraftError, InputError
    from clipgraft_video.protocols import refuse_leak

    trained = list(train or ())
    if not trained and (Path(model) / "config.yaml").is_file():
        _, config = load_run(Path(model), registry=registry)
        trained = [config.data.from_]
    for reference in trained:
        try:
            source = open_source(reference, registry=registry)
        except ClipgraftError as error:
            raise InputError(f"{error}; it was trained on, so leaks can't be ruled out: give it with --train") from None
        ids = [entry_of(source, k).id for k in range(len(source))]
        for tested in references:
            test = open_source(tested, registry=registry)
            refuse_leak(ids, [entry_of(test, k).id for k in range(len(test))])


def _one(
    model: VideoModel,
    reference: str,
    *,
    protocol: Protocol,
    template: Sequence[str],
    views: int,
    crops: Any,
    batch_size: int,
    registry: Registry,
    log: RunLog,
) -> Evaluation:
    from clipgraft.data import open_source
    from clipgraft_video.evaluate import Views, classify, retrieve
    from clipgraft_video.evaluator import videos_of

    source = videos_of(open_source(reference, registry=registry))
    if protocol is Protocol.retrieval:
        return retrieve(model, source, batch_size=batch_size, log=log)
    return classify(model, source, templates=template, views=Views(views, crops), batch_size=batch_size, log=log)


def _summary(found: dict[str, Evaluation], data: Sequence[str], protocol: Protocol) -> dict[str, float]:
    """Means and spreads over splits; base, novel and their harmonic mean."""
    from clipgraft_video.protocols import harmonic_mean

    if protocol is Protocol.base_to_novel:
        tops = [e.metrics["top1"] for e in found.values()]
        base, novel = statistics.fmean(tops[::2]), statistics.fmean(tops[1::2])
        return {"base": base, "novel": novel, "harmonic_mean": harmonic_mean(base, novel)}
    if len(data) < 2:
        return {}
    names = [name for name in next(iter(found.values())).metrics if all(name in e.metrics for e in found.values())]
    rows = {name: [e.metrics[name] for e in found.values()] for name in names}
    mean = {f"mean {name}": statistics.fmean(values) for name, values in rows.items()}
    return mean | {f"std {name}": statistics.stdev(values) for name, values in rows.items()}
