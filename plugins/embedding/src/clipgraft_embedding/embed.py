"""Embed a source of any size in bounded memory, over any number of processes, and continue after an interruption."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from clipgraft.data.base import Source
from clipgraft.distributed import rank, to_all, world_size
from clipgraft.encoders.base import Encoder
from clipgraft.errors import ClipgraftError, InputError, Interrupted
from clipgraft.log import RunLog
from clipgraft_embedding.parts import Dtype, PartRows, Parts, Plan
from clipgraft_embedding.precision import settle
from clipgraft_embedding.store import About, Embeddings, check_suffix, join
from clipgraft_embedding.stream import Span, read, spans, usual_workers
from clipgraft_embedding.tower import Kind, Precision, Tower, tower_sha256, usual_batch_size

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Embedded:
    """A finished file. ``encoded`` samples of ``about.total`` were new in this call and took ``seconds``.

    ``error``: largest 1 - cosine to fp32 over the probe, 0 at fp32.
    """

    path: Path
    about: About
    encoded: int
    seconds: float
    error: float

    @property
    def rate(self) -> float:
        """Samples per second of this call, decoding and writing included."""
        return self.encoded / self.seconds if self.encoded else 0.0


def embed(
    encoder: Encoder,
    source: Source,
    *,
    out: str | Path,
    kind: Kind = "images",
    model: str = "",
    batch_size: int | None = None,
    workers: int | None = None,
    precision: Literal["auto", "fp32", "bf16"] = "fp32",
    dtype: Dtype = "fp32",
    shard_size: int = 2048,
    restart: bool = False,
    log: RunLog | None = None,
) -> Embedded:
    """Write ``out`` (.safetensors or .parquet); call again with the same arguments to continue what was interrupted.

    ``model`` is the reference by which searches open the encoder again (its own by default). Parts of ``shard_size``
    samples gather in ``.NAME.parts`` beside ``out``, each whole or absent. With a process group every rank calls this
    with the same arguments; a part is made by one rank, rank 0 joins them. The bytes of ``out`` depend on the model,
    the data, ``batch_size``, ``shard_size``, ``precision`` and ``dtype``, on the number of threads and on the machine;
    not on workers, ranks or interruptions. ``restart`` discards what was begun or is there. Unreadable samples are
    left out and counted.
    """
    out, start = Path(out), time.monotonic()
    batch_size = usual_batch_size(encoder) if batch_size is None else batch_size
    check_suffix(out)
    if batch_size < 1 or shard_size < 1:
        raise InputError("batch_size and shard_size are at least 1")
    if hasattr(source, "patterns"):
        raise InputError(f"{source.name} holds minimal pairs; this needs single images")
    if kind == "texts":
        encoder.tokenizer  # noqa: B018 - refuses an encoder without a text tower
    log = log or RunLog(is_main=False)
    plan = Plan(
        kind=kind,
        model=model or encoder.data.origin.uri,
        tower_sha256=tower_sha256(encoder, kind),
        source=source.name,
        fingerprint=source.fingerprint,
        preprocess=encoder.preprocess.as_dict(),
        total=len(source),
        precision="fp32" if precision == "auto" else precision,
        dtype=dtype,
        batch_size=batch_size,
        shard_size=shard_size,
    )
    if len(set(together(lambda: (plan.tower_sha256, plan.fingerprint, batch_size, shard_size)))) > 1:
        raise InputError("the processes hold different models, data or settings; give all of them the same ones")
    batches, parts = spans(len(source), shard_size=shard_size, batch_size=batch_size), Parts(out)
    with ExitStack() as lock:

        def begin() -> Begun | None:
            if rank():
                return None
            lock.enter_context(parts)
            return _begin(encoder, source, out, parts, plan, asked=precision, restart=restart, log=log)

        begun = together(begin)[0]
        assert begun is not None
        if begun.about is not None:
            return Embedded(out, begun.about, 0, 0.0, 0.0)
        plan = dataclasses.replace(plan, precision=begun.precision)
        todo = [span for part in begun.missing[rank() :: world_size()] for span in batches[part]]
        workers = usual_workers(source, kind) if workers is None else workers
        together(lambda: _fill(parts, encoder, source, todo, plan, workers=workers, log=log))
        files, draft = [parts.path(part) for part in range(len(batches))], parts.folder / "joined.tmp"

        def finish() -> About | None:
            return join(out, plan, files, classes=source.classes, draft=draft) if rank() == 0 else None

        about = together(finish)[0]
        assert about is not None
        if rank() == 0:
            parts.remove()
    encoded = sum(span.stop - span.start for part in begun.missing for span in batches[part])
    return Embedded(out, about, encoded, time.monotonic() - start, begun.error)


@dataclass(frozen=True, slots=True)
class Begun:
    """What rank 0 found: the parts to make, in which precision, at what error; ``about`` if ``out`` is there."""

    missing: list[int]
    precision: Precision
    error: float
    about: About | None = None


def together(step: Callable[[], T]) -> list[T]:
    """Every rank's result in rank order, everywhere; what fails on one rank fails on all, so that none waits for it."""
    try:
        result, failure = step(), None
    except ClipgraftError as error:
        if world_size() == 1:
            raise
        result, failure = cast(T, None), error
    found = to_all((result, failure))
    if errors := [error for _, error in found if error is not None]:
        raise errors[0]
    return [result for result, _ in found]


def _begin(
    encoder: Encoder,
    source: Source,
    out: Path,
    parts: Parts,
    plan: Plan,
    *,
    asked: Literal["auto", "fp32", "bf16"],
    restart: bool,
    log: RunLog,
) -> Begun:
    """Compare with what is there, settle the precision, list the missing parts."""
    if out.exists():
        there = Embeddings.open(out).about  # anything else is not ours to replace
        differs = plan.difference(_comparable(dataclasses.asdict(there), asked))
        if not restart:
            if differs:
                raise InputError(f"{out} is there already, but {differs} differs; use --restart to replace it")
            parts.remove()
            log.info(f"{out} is there already, made of the same model and data")
            return Begun([], plan.precision, 0.0, there)
    before = {} if restart else parts.plan()
    if differs := plan.difference(_comparable(before, asked)):
        raise InputError(
            f"{parts.folder} was begun differently: {differs} differs; give the same, or --restart to begin anew"
        )
    choice = settle(
        encoder, source, kind=plan.kind, asked=before.get("precision", asked), most=plan.batch_size, log=log
    )
    if not before:
        parts.begin(dataclasses.replace(plan, precision=choice.precision))
    count = -(-plan.total // plan.shard_size)
    missing = parts.missing(count)
    if len(missing) < count:
        log.info(f"continuing: {count - len(missing)} of {count} parts are there")
    return Begun(missing, choice.precision, choice.error)


def _comparable(there: dict[str, Any], asked: str) -> dict[str, Any]:
    """``auto`` is content with any precision that was chosen."""
    return {k: v for k, v in there.items() if k != "precision" or asked != "auto"}


def _fill(
    parts: Parts, encoder: Encoder, source: Source, todo: Sequence[Span], plan: Plan, *, workers: int, log: RunLog
) -> None:
    """Make the parts of ``todo``, in order."""
    tower, started, total = Tower(encoder, plan.kind, plan.precision), time.monotonic(), len(source)
    mine = sum(span.stop - span.start for span in todo)
    alone = world_size() == 1
    title = f"embedding {source.name}" + ("" if alone else f" ({mine} of {total} in this process)")
    part, done, made, unreadable, first = PartRows(), 0, 0, 0, list[str]()
    try:
        with log.progress(title, total if alone else mine, done=total - mine if alone else 0) as bar:
            for rows in read(source, todo, kind=plan.kind, preprocess=encoder.preprocess, workers=workers):
                span = rows.span
                part.ids += rows.ids
                part.labels += rows.labels
                part.captions += rows.captions
                part.bad += rows.bad
                unreadable += len(rows.bad)
                first = (first + rows.bad)[:3]
                inputs = [rows.pixels] if rows.pixels is not None else _batches(rows.captions, plan)
                part.embeddings += [tower(batch) for batch in inputs]
                if span.stop == min((span.part + 1) * plan.shard_size, total):
                    dim = encoder.image.embed_dim
                    parts.write(span.part, part, dim=dim, dtype=plan.dtype)
                    part, made = PartRows(), made + 1
                done += span.stop - span.start
                rate = done / (time.monotonic() - started)
                bar.advance(span.stop - span.start, note=f"{rate:.1f} {plan.kind}/s")
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; parts made in this call and kept: {made}; the same command continues"
        ) from None
    if unreadable:
        log.info(f"skipped {unreadable} that can't be read: {'; '.join(first)}{'; ...' if unreadable > 3 else ''}")


def _batches(captions: list[str], plan: Plan) -> list[list[str]]:
    """Captions of the samples of a batch, in forward passes of ``batch_size``; none for images."""
    texts = captions if plan.kind == "texts" else []
    return [texts[at : at + plan.batch_size] for at in range(0, len(texts), plan.batch_size)]
