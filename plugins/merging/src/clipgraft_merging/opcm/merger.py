"""Merging models one after another: each is folded into a sum on disk, which makes the merged model."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from clipgraft.errors import InputError
from clipgraft.files import whole_folder
from clipgraft.log import RunLog
from clipgraft_merging.opcm.projection import project
from clipgraft_merging.opcm.settings import ContinualSettings
from clipgraft_merging.opcm.state import FOLDER, SUM, ContinualState, Merged, check_fits, read_state, write_state
from clipgraft_merging.ties.merger import Ties
from clipgraft_merging.weights.families import fuse, kind_of, split
from clipgraft_merging.weights.inputs import BASE, Inputs
from clipgraft_merging.weights.stores import FileStore
from clipgraft_merging.weights.writer import SafetensorsWriter

if TYPE_CHECKING:
    from clipgraft.registry import Registry

OUTSIDE_LEAVES = re.compile(r"(visual\.class_embedding|logit_scale|logit_bias)")
"""Parameters that are no leaf module's own in Hugging Face's CLIP, so that the official code never visits them."""


@dataclass(kw_only=True)
class ContinualMerge:
    """A ``Merger`` that folds the inputs' models, in their order, into the sum of ``state``; the result is ``after``.

    ``work`` is a folder for sums; two are in it at a time, whatever the number of models.
    """

    state: ContinualState
    work: Path
    name: str = field(default="merging/opcm", init=False)
    after: ContinualState = field(init=False)

    def __post_init__(self) -> None:
        self.after = self.state

    def settings(self) -> dict[str, Any]:
        """The method, every model in order with |tau|, and the scale of the sum."""
        told = self.after.as_dict()
        return {
            **told["settings"],
            "merged": told["models"],
            "sum_norm": self.after.norm,
            "sum_scale": self.after.scale,
        }

    def prepare(self, inputs: Inputs, log: RunLog) -> None:
        """One pass per model."""
        if inputs.base is None:
            raise InputError("task vectors start at the model that was fine-tuned; give --base MODEL")
        keys = inputs.float_keys
        if self.after.store is not None:
            _same_tensors(self.after.store, inputs)
        for index, model in enumerate(inputs.models):
            with log.progress(f"{self.state.settings.method}: model {len(self.after.models) + 1}", len(keys)) as bar:
                self._fold(inputs, index, Merged(model.ref, model.sha256, 0.0), log, bar)

    def merge(self, key: str, inputs: Inputs) -> Tensor:
        """theta_0 + scale S; the base's own bits where S is zero, and the first model's where it is alone."""
        store, scale = self.after.store, self.after.scale
        assert store is not None
        if len(self.after.models) == 1 == len(inputs.models) and scale == 1:
            return inputs.tensor(0, key)
        base, total = inputs.base_tensor(key), store.read(key)
        return base.double().add_(total, alpha=scale) if total.any() else base

    def _fold(self, inputs: Inputs, index: int, model: Merged, log: RunLog, bar: Any) -> None:
        before, settings = self.after, self.after.settings
        path = self.work / f"{SUM}.{(len(before.models) + 1) % 2}"
        ties = _Ties.prepared(self, inputs, index, log) if settings.method == "ties" and before.models else None
        squares, task_squares = dict[str, float](), []
        entries = {key: (inputs.shape(key), torch.float32) for key in inputs.float_keys}
        with SafetensorsWriter(path, entries) as writer:
            for key in inputs.float_keys:
                task = self.task_vector(inputs, index, key)
                task_squares.append(_square(task))
                total = self._added(key, task) if ties is None else ties.added(key)
                squares[key] = _square(total)
                writer.write(key, total)
                bar.advance()
            for key, total in () if ties is None else ties.late():
                squares[key] = _square(total)
                writer.write(key, total)
        store, merged = FileStore([path]), replace(model, norm=math.sqrt(math.fsum(task_squares)))
        norm = math.sqrt(math.fsum(squares.values()))
        self.after = replace(before, models=(*before.models, merged), norm=norm, store=store)

    def task_vector(self, inputs: Inputs, index: int, key: str) -> Tensor:
        """theta_t - theta_0 in fp32, rounded once."""
        return (inputs.tensor(index, key).double() - inputs.base_tensor(key)).float()

    def _added(self, key: str, task: Tensor) -> Tensor:
        """The sum with one more task vector in it."""
        before, settings = self.after, self.after.settings
        if before.store is None:
            return settings.scale * task if settings.method == "ties" else task
        total = before.store.read(key)
        if settings.method != "opcm":
            return total + task
        if settings.compat == "fusionbench" and OUTSIDE_LEAVES.fullmatch(key):
            return total * before.scale  # left alone, then scaled with the rest: it shrinks
        return total + _projected(key, task, total, settings)


def _projected(key: str, task: Tensor, total: Tensor, settings: ContinualSettings) -> Tensor:
    """P of a matrix, of each of q, k and v; anything else as it is."""
    kind = kind_of(key, task.shape)
    if task.ndim != 2 or kind not in ("matrix", "fused_qkv"):
        return task
    keep = {"alpha": settings.alpha, "mode": settings.mode, "compat": settings.compat}
    if settings.qkv == "fused":
        return project(task, total, **keep)  # type: ignore[arg-type]
    pairs = zip(split(key, task), split(key, total), strict=True)
    return fuse(key, [project(new, old, **keep) for new, old in pairs])  # type: ignore[arg-type]


class _Ties(NamedTuple):
    """TIES of the two task vectors S and tau, one tensor at a time."""

    inner: Ties
    view: Any
    scale: float

    @classmethod
    def prepared(cls, merge: ContinualMerge, inputs: Inputs, index: int, log: RunLog) -> _Ties:
        settings = merge.after.settings
        inner = Ties(density=settings.density, merge_by="sum")
        view = _TwoVectors(merge, inputs, index)
        inner.prepare(cast("Inputs", view), log)
        return cls(inner, view, settings.scale)

    def added(self, key: str) -> Tensor:
        """S + scale TIES(S, tau)."""
        return self.view.total(key) + self.scale * self.inner.merge(key, self.view)  # type: ignore[no-any-return]

    def late(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors in which signs had cancelled, again."""
        for key, found in self.inner.rewrites(self.view):
            yield key, self.view.total(key) + self.scale * found


class _TwoVectors:
    """What TIES asks of its inputs: a base of zeros, and as models the sum so far and a new task vector."""

    def __init__(self, merge: ContinualMerge, inputs: Inputs, index: int) -> None:
        self.base, self.models, self.float_keys = inputs.base, (None, None), inputs.float_keys
        self._merge, self._inputs, self._index, self._store = merge, inputs, index, merge.after.store

    def total(self, key: str) -> Tensor:
        assert self._store is not None
        return self._store.read(key)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._inputs.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        return torch.float32

    def base_tensor(self, key: str) -> Tensor:
        return torch.zeros(self.shape(key))

    def piece(self, index: int, key: str, start: int, stop: int) -> Tensor:
        assert self._store is not None
        if index == BASE:
            return torch.zeros(stop - start)
        if index == 0:
            return self._store.piece(key, start, stop)
        new, base = (self._inputs.piece(i, key, start, stop) for i in (self._index, BASE))
        return (new.double() - base).float()


def _square(x: Tensor) -> float:
    return float(x.square().sum(dtype=torch.float64))


def _same_tensors(store: FileStore, inputs: Inputs) -> None:
    here = {key: inputs.shape(key) for key in inputs.float_keys}
    there = {key: entry.shape for key, entry in store.entries.items()}
    if odd := sorted(k for k in here.keys() | there.keys() if here.get(k) != there.get(k)):
        raise InputError(
            f"the sum of this merge has {odd[0]} of {there.get(odd[0])}, the models {here.get(odd[0])} "
            f"({len(odd)} such); merge models of one architecture"
        )


def merge_into(
    out: Path, inputs: Inputs, state: ContinualState, *, log: RunLog | None = None, registry: Registry | None = None
) -> ContinualState:
    """Fold the inputs' models into ``state`` and write the export ``out`` with the new state, whole or not at all.

    ``out`` may be the export that ``state`` was read from.
    """
    from clipgraft.checkpoint import MANIFEST
    from clipgraft_merging.weights.engine import merge_to

    out = Path(out)
    for checkpoint in inputs.all:
        if checkpoint.folder is not None and checkpoint.folder.resolve() == out.expanduser().resolve():
            raise InputError(f"{out} is the input {checkpoint.ref} and would replace it; choose another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.sum-") as work,
        whole_folder(out, marker=MANIFEST) as draft,
    ):
        merger = ContinualMerge(state=state, work=Path(work))
        merge_to(draft, inputs, merger, log=log, registry=registry)
        (folder := draft / FOLDER).mkdir()
        assert merger.after.store is not None
        merger.after.store.files[0].replace(folder / SUM)
        write_state(folder, merger.after)
    return read_state(out)


def new_state(inputs: Inputs, settings: ContinualSettings) -> ContinualState:
    """Nothing merged yet."""
    if inputs.base is None:
        raise InputError("task vectors start at the model that was fine-tuned; give --base MODEL")
    return ContinualState(settings, inputs.base.ref, inputs.base.sha256)


def check_new(state: ContinualState, inputs: Inputs) -> None:
    """Raise when a model is in the merge already, is named twice, or the base is another."""
    seen: Sequence[str] = []
    for model in inputs.models:
        assert inputs.base is not None
        check_fits(state, inputs.base, model)
        if model.sha256 in seen:
            raise InputError(f"{model.ref} is named twice, or is a copy of another model; leave one out")
        seen = [*seen, model.sha256]
