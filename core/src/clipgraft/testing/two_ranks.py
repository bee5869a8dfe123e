"""Conformance over processes: two gloo ranks take two steps, and their gradients are those of the whole batch.

DDP makes the gradients of all ranks equal whatever a stage does, so equality alone proves little. Before its first step
every stage is therefore asked what one process would get: with the batches and random states of both ranks, and with
the process group hidden. That is

- for a ``ContrastiveStage``: features of both halves under their random states, then the loss of the whole batch;
- for another stage with ``batch_coupled``: one forward on the whole batch, if that draws nothing;
- for any other stage: the mean of the losses of both halves, which, if nothing is drawn, is also that of the whole.

A stage with a loader of its own reads what no batch holds; there the ranks are compared with each other alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from clipgraft import distributed
from clipgraft.data.loader import TrainLoader
from clipgraft.spec import runhook
from clipgraft.stage import ContrastiveStage, TrainStage
from clipgraft.state import rng_state, set_rng_state
from clipgraft.testing.ranks import run_ranks
from clipgraft.testing.subject import NotApplicable, Subject, Violation
from clipgraft.testing.trial import HALF, Trial
from clipgraft.types import Batch, StepOutput

if TYPE_CHECKING:
    from clipgraft.runner import Run

RELATIVE, ABSOLUTE = 1e-3, 1e-5
"""Of the largest entry of a tensor's gradient, and of the largest entry of all."""

PATIENCE = 600
"""Of a machine that does other things too [seconds]."""

Wanted = list[tuple[str, dict[str, Tensor]]]
"""What a gradient should be, in words and by parameter."""


def ranks_agree(trial: Trial) -> None:
    """Run the recipe on two ranks and compare there."""
    trial.config(steps=HALF)  # tells what can't be run, and makes the suite's own model and pictures
    subject = trial.subject
    arguments = (subject.name, tuple(map(str, subject.files)), trial.recipe.name, str(trial.folder))
    try:
        answers: list[tuple[str, str]] = run_ranks(on_a_rank, 2, *arguments, timeout=PATIENCE)
    except RuntimeError as error:
        raise Violation(f"{trial.recipe.name} on two ranks: {str(error).strip().splitlines()[-1]}") from error
    for kind, said in answers:
        if kind != "fine":
            raise (NotApplicable if kind == "skip" else Violation)(said)
    trained, compared = answers[0][1].split()
    if trained == "0":
        raise NotApplicable(f"{trial.recipe.name} has no training stage")
    if trained != compared:
        raise NotApplicable(
            f"{trial.recipe.name}: gradients and weights are equal on both ranks; whether they are those of one "
            "process can't be told where a loss of the whole batch draws random numbers, or a stage has its own loader"
        )


def on_a_rank(name: str, files: tuple[str, ...], recipe: str, folder: str) -> tuple[str, str]:
    """One rank: ("fine", numbers of stages trained and compared), or ("skip" or "violation", why)."""
    hook = Compare()
    try:
        trial = Trial(Subject(name, tuple(map(Path, files))), recipe, Path(folder))
        trial.run("ranks", trial.config(steps=HALF), hook)
    except NotApplicable as error:
        return "skip", f"on two ranks: {error}"
    except Violation as error:
        return "violation", f"on two ranks: {error}"
    return "fine", f"{hook.trained} {hook.compared}"


class Compare:
    """What every stage's first gradient should be, against what it is."""

    def __init__(self) -> None:
        self.stage: TrainStage | None = None
        self.wanted: Wanted = []
        self.trained = self.compared = 0

    @runhook
    def before_step(self, run: Run, stage: TrainStage, step: int, batch: Batch) -> None:
        """Before a stage's first forward: what one process would get."""
        if stage is self.stage:
            return
        self.stage = stage
        self.trained += 1
        _equal(stage, dict(stage.trained_state()), "the ranks start with other weights")
        batches, held = distributed.to_all(batch), rng_state()
        states = distributed.to_all(held)
        kept = [(m, n, b, b.clone()) for m in stage.modules() for n, b in m._buffers.items() if b is not None]
        own_loader = any(isinstance(value, TrainLoader) for m in stage.modules() for value in vars(m).values())
        if not own_loader:
            with one_process():
                self.wanted = expected(stage, batches, states)
        for module, name, buffer, value in kept:  # a step may put another tensor in a buffer's place
            module._buffers[name] = buffer.copy_(value)
        set_rng_state(held)

    @runhook
    def before_optimizer(self, run: Run, stage: TrainStage, step: int) -> None:
        """Gradients as DDP left them."""
        grads = {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}
        _equal(stage, grads, "the ranks have other gradients")
        for what, wanted in self.wanted:
            _close(stage, grads, wanted, what)
        self.compared += bool(self.wanted)
        self.wanted = []

    @runhook
    def after_step(self, run: Run, stage: TrainStage, step: int) -> None:
        """Weights after the step; buffers are the affair of each rank."""
        trained = {name: p for name, p in stage.named_parameters() if p.requires_grad}
        _equal(stage, trained, "the ranks end a step with other weights")


@contextmanager
def one_process() -> Iterator[None]:
    """Hide the process group from whoever asks torch or ``clipgraft.distributed``."""
    hidden: dict[str, Callable[..., Any]] = {
        "is_initialized": lambda: False,
        "get_rank": lambda *_: 0,
        "get_world_size": lambda *_: 1,
    }
    real = {name: getattr(dist, name) for name in hidden}
    try:
        for name, function in hidden.items():
            setattr(dist, name, function)
        yield
    finally:
        for name, function in real.items():
            setattr(dist, name, function)


def expected(stage: TrainStage, batches: list[Batch], states: list[dict[str, Tensor]]) -> Wanted:
    """The gradients that one process gets from what all ranks hold; empty where randomness forbids to say."""
    whole = joined(batches)
    if isinstance(stage, ContrastiveStage):
        parts = []
        for batch, state in zip(batches, states, strict=True):
            set_rng_state(state)
            parts.append(stage.encode(batch))
        before = rng_state()
        output = stage.loss_from(tuple(torch.cat(column) for column in zip(*parts, strict=True)), whole)
        what = "of the whole batch; gather features with clipgraft.distributed.gather_with_grad"
        return [(what, _gradient(stage, output.loss))] if _alike(before, rng_state()) else []
    found, drew = Wanted(), False
    if not stage.batch_coupled:
        outputs: list[StepOutput] = []
        for batch, state in zip(batches, states, strict=True):
            set_rng_state(state)
            outputs.append(stage(batch))
            drew = drew or not _alike(state, rng_state())
        mean = torch.stack([output.loss for output in outputs]).mean()
        found.append(("of one process for the same samples", _gradient(stage, mean)))
    norms = [m for m in stage.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    if not drew and (stage.batch_coupled or not norms):  # batch norm sees the samples of its rank, which is no mistake
        before = rng_state()
        gradient = _gradient(stage, stage(whole).loss)
        more = "" if stage.batch_coupled else "; if samples are contrasted, set batch_coupled and gather the features"
        found += [(f"of the whole batch{more}", gradient)] if _alike(before, rng_state()) else []
    return found


def _gradient(stage: TrainStage, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in stage.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, [*named.values()], allow_unused=True)
    return {name: grad for name, grad in zip(named, grads, strict=True) if grad is not None}


def _close(stage: TrainStage, found: dict[str, Tensor], wanted: dict[str, Tensor], what: str) -> None:
    largest = max((float(g.abs().max()) for g in wanted.values()), default=0.0)
    for name, grad in wanted.items():
        bound = RELATIVE * float(grad.abs().max()) + ABSOLUTE * largest
        error = float((found[name] - grad).abs().max()) if name in found else float("inf")
        if not error <= bound:
            raise Violation(f"{stage.name}: the gradient of {name} is not that {what} (off by {error:.2g})")


def _equal(stage: TrainStage, tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise on every rank when the bits differ between them."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    if len(set(distributed.to_all(digest.hexdigest()))) > 1:
        raise Violation(f"{stage.name}: {what}; nothing that is trained may depend on the rank")


def joined(batches: list[Batch]) -> Batch:
    """The rows of several batches as one."""

    def cat(values: list[Any]) -> Any:
        if isinstance(values[0], Tensor):
            return torch.cat(values)
        if isinstance(values[0], dict):
            return {key: cat([value[key] for value in values]) for key in values[0]}
        return None if values[0] is None else [row for value in values for row in value]

    return Batch(**{f.name: cat([getattr(b, f.name) for b in batches]) for f in fields(Batch)})


def _alike(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())
