"""Merge key by key: read one tensor of each model, fold, cast once, write, drop; memory doesn't grow with models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from clipgraft.errors import ClipgraftError, InputError
from clipgraft.log import RunLog
from clipgraft_merging.weights.checkpoints import Checkpoint, open_checkpoint
from clipgraft_merging.weights.export import merged_folder
from clipgraft_merging.weights.inputs import Inputs, finite

if TYPE_CHECKING:
    from clipgraft.registry import Registry

__all__ = ["Checkpoint", "Inputs", "Merger", "merge_each", "merge_state", "merge_to", "open_checkpoint", "open_inputs"]


class Merger(Protocol):
    """A method. ``merge`` sees floating tensors only and returns any floating type; the engine casts it once.

    A method may also have ``rewrites(inputs)``, called after the last key: (key, tensor) pairs that replace what was
    written, for what is known at the end only.
    """

    name: str

    def settings(self) -> dict[str, Any]:
        """Plain JSON values that reproduce the method; they are written into the result."""

    def prepare(self, inputs: Inputs, log: RunLog) -> None:
        """Whatever needs a pass of its own over the data."""

    def merge(self, key: str, inputs: Inputs) -> Tensor:
        """The merged tensor; an input returned as it is stays bit for bit what it was."""


def open_inputs(
    models: Sequence[str | Path], *, base: str | Path | None = None, registry: Registry | None = None
) -> Inputs:
    """Open and check the checkpoints of a merge."""
    opened = None if base is None else open_checkpoint(base, registry=registry)
    return Inputs(opened, tuple(open_checkpoint(model, registry=registry) for model in models))


def merge_state(inputs: Inputs, merger: Merger, *, log: RunLog | None = None) -> Iterator[tuple[str, Tensor]]:
    """(canonical name, tensor) in the base's dtype; a name that comes twice counts as it comes last."""
    log = log or RunLog(is_main=False)
    merger.prepare(inputs, log)
    for key in inputs.keys:
        yield from inputs.under_each_name(key, _merged(key, inputs, merger))
    for key, tensor in _rewrites(merger, inputs):
        yield from inputs.under_each_name(key, _cast(tensor, key, inputs))


def merge_to(
    out: Path, inputs: Inputs, merger: Merger, *, log: RunLog | None = None, registry: Registry | None = None
) -> Path:
    """Merge into the export folder ``out``, which is replaced when all is written, and return it."""
    merge_each({Path(out): merger}, inputs, log=log, registry=registry)
    return Path(out)


def merge_each(
    outs: Mapping[Path, Merger], inputs: Inputs, *, log: RunLog | None = None, registry: Registry | None = None
) -> None:
    """Several results from one read of the inputs, each a folder of its own."""
    log = log or RunLog(is_main=False)
    for out in outs:
        _refuse_input(Path(out), inputs)
    for merger in outs.values():
        merger.prepare(inputs, log)
    with log.progress("hashing models", total=len(inputs.all)) as bar:
        for checkpoint in inputs.all:
            checkpoint.sha256  # noqa: B018  (kept by the checkpoint)
            bar.advance()
    # several results share what was read of a key; one result reads each model's tensor and drops it
    shared = inputs.holding() if len(outs) > 1 else inputs
    with ExitStack() as stack:
        writers = [(m, stack.enter_context(merged_folder(Path(out), inputs, m))) for out, m in outs.items()]
        names = " and ".join(dict.fromkeys(m.name for m in outs.values()))
        with log.progress(f"merging ({names})", total=len(inputs.keys)) as bar:
            for key in inputs.keys:
                for merger, write in writers:
                    write(key, _merged(key, shared, merger))
                shared.release()
                bar.advance(note=key)
            for merger, write in writers:
                for key, tensor in _rewrites(merger, inputs):
                    write(key, _cast(tensor, key, inputs))


def _merged(key: str, inputs: Inputs, merger: Merger) -> Tensor:
    if not inputs.dtype(key).is_floating_point:
        return _copied(key, inputs)
    return _cast(merger.merge(key, inputs), key, inputs)


def _cast(tensor: Tensor, key: str, inputs: Inputs) -> Tensor:
    """To the dtype of the inputs, once."""
    if tuple(tensor.shape) != inputs.shape(key):
        raise ValueError(f"{key}: merged to {tuple(tensor.shape)} instead of {inputs.shape(key)}")
    cast = tensor.to(inputs.dtype(key))
    if not finite(cast):
        raise ClipgraftError(f"the merged {key} is not finite in {inputs.dtype(key)}; use a smaller scale")
    return cast


def _copied(key: str, inputs: Inputs) -> Tensor:
    """A tensor of integers or flags: the reference's, after every model was found to have the same."""
    own = inputs.reference.tensor(key)
    for other in inputs.all:
        if not torch.equal(own, other.tensor(key)):
            raise InputError(
                f"{inputs.reference.ref} and {other.ref} differ in {key}, which holds {inputs.dtype(key)} and can't be "
                "averaged; merge models that agree on it"
            )
    return own


def _rewrites(merger: Merger, inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
    rewrites = getattr(merger, "rewrites", None)
    yield from () if rewrites is None else rewrites(inputs)


def _refuse_input(out: Path, inputs: Inputs) -> None:
    target = out.expanduser().resolve()
    for checkpoint in inputs.all:
        files = getattr(checkpoint.store, "files", [])
        if any(target in file.resolve().parents for file in files):
            raise InputError(f"{out} holds the input {checkpoint.ref} and would replace it; choose another --out")
