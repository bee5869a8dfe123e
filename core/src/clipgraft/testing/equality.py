"""Does a recipe train the same weights in several processes as in one? For tests of recipes.

    one = traced("x/method:tiny", {"train.steps": 3}, tmp / "one")
    with Ranks(2) as ranks:
        many = ranks.call(traced, "x/method:tiny", {"train.steps": 3}, tmp / "two")
    assert worst(one, many[0]).weights < 1e-3

What a stage draws for a batch (noise, steps of a diffusion, dropout) is each process's own in a real run. Here all of
them draw what one process would have drawn for the whole batch and take their rows, so that what remains is the maths.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from clipgraft import distributed, execution, trainer
from clipgraft.runner import Run
from clipgraft.sharding import whole_tensor
from clipgraft.stage import StageResult, TrainStage


@dataclass
class Trace:
    """One training stage: its weights before and after, and the first step's gradients, by parameter name.

    ``draws``: how many draws of random numbers had a row per sample.
    """

    before: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, Tensor] = field(default_factory=dict)
    draws: int = 0

    def digest(self) -> str:
        """Of the trained weights after: equal on all ranks, bit for bit."""
        rows = [(name, self.after[name].contiguous().flatten().view(torch.uint8)) for name in sorted(self.gradients)]
        return hashlib.sha256(b"".join(name.encode() + x.numpy().tobytes() for name, x in rows)).hexdigest()


@dataclass(frozen=True, slots=True)
class Worst:
    """The largest relative error of the gradients, and where; of the weights, relative to how far they moved."""

    gradients: float
    weights: float
    where: str


class Dealt(TorchFunctionMode):
    """Draws by the global generator whose first axis is one of ``sizes``: those of all ranks' rows, each its own.

    A call with a generator of its own, or of another shape, stays as it is.
    """

    def __init__(self, sizes: set[int]) -> None:
        super().__init__()
        self.sizes, self.count = sizes, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every call of torch passes here."""
        kwargs = dict(kwargs or {})
        if kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        if func in (torch.rand_like, torch.randn_like):
            x = args[0]
            like = {"dtype": x.dtype, "device": x.device} | kwargs
            return self._rows(torch.rand if func is torch.rand_like else torch.randn, (tuple(x.shape),), like, at=0)
        if func in (torch.rand, torch.randn):
            shape = args[0] if args and isinstance(args[0], Sequence) else args
            return self._rows(func, (tuple(shape),), kwargs, at=0)
        if func is torch.randint and len(args) > 1:
            return self._rows(func, args, kwargs, at=len(args) - 1)
        if func is F.dropout:
            x, p, training = (*args, *(0.5, True)[len(args) - 1 :])[:3]
            p, training = kwargs.get("p", p), kwargs.get("training", training)
            if not training or not p:
                return x
            return x * (self._rows(torch.rand, (tuple(x.shape),), {"device": x.device}, at=0) >= p) / (1 - p)
        if func is torch.multinomial:
            weights, count = args[0], args[1] if len(args) > 1 else kwargs["num_samples"]
            assert count == 1 or kwargs.get("replacement"), "rows without replacement are not dealt"
            share = weights.double().cumsum(-1)
            point = self._rows(torch.rand, ((*weights.shape[:-1], count),), {"dtype": torch.float64}, at=0)
            found = torch.searchsorted(share, point.to(share.device) * share[..., -1:], right=True)
            return found.clamp(max=weights.shape[-1] - 1)
        return func(*args, **kwargs)

    def _rows(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, at: int) -> Tensor:
        shape = tuple(args[at])
        if not shape or shape[0] not in self.sizes:
            return func(*args, **kwargs)  # type: ignore[no-any-return]
        self.count += 1
        world, size = distributed.world_size(), shape[0]
        whole: Tensor = func(*args[:at], (size * world, *shape[1:]), *args[at + 1 :], **kwargs)
        return whole[distributed.rank() * size : (distributed.rank() + 1) * size]


@contextmanager
def _watched(traces: dict[str, Trace], *, rows: Sequence[int]) -> Iterator[None]:
    """Every ``Trainer.fit`` leaves its trace; ``rows``: batches of further streams, over all ranks."""
    fit, clip, seed = trainer.Trainer.fit, trainer.Trainer._clip, Run.seed_stage

    def watched_fit(self: trainer.Trainer, run: Run, stage: TrainStage) -> StageResult:
        again = sum(name.partition("#")[0] == stage.name for name in traces)
        trace = traces[f"{stage.name}#{again}" if again else stage.name] = Trace(before=_weights(stage))
        world, chunks = distributed.world_size(), self.config.accumulate
        dealt = Dealt({n // (world * chunks) for n in (self.config.batch_size, *rows)})
        with dealt:
            result = fit(self, run, stage)
        trace.after, trace.draws = _weights(stage), dealt.count
        return result

    def watched_clip(self: trainer.Trainer, run: Run, stage: TrainStage) -> Tensor | None:
        trace = [*traces.values()][-1]
        if not trace.gradients:
            named = [(n, p.grad) for n, p in stage.named_parameters() if p.grad is not None]
            trace.gradients = {name: whole_tensor(g).detach().cpu().clone() for name, g in named}
        return clip(self, run, stage)

    def same_seed(self: Run, name: str, *, per_rank: bool = False) -> None:
        with mock.patch.object(distributed, "rank", lambda: 0):
            seed(self, name, per_rank=per_rank)

    with (
        mock.patch.object(trainer.Trainer, "fit", watched_fit),
        mock.patch.object(trainer.Trainer, "_clip", watched_clip),
        mock.patch.object(Run, "seed_stage", same_seed),
    ):
        yield


def _weights(stage: TrainStage) -> dict[str, Tensor]:
    return {name: x.detach().cpu().clone() for name, x in stage.trained_state().items()}


def traced(recipe: str, overrides: Mapping[str, Any], out: Path | str, rows: Sequence[int] = ()) -> dict[str, Trace]:
    """Run ``recipe`` with ``overrides`` into ``out`` -> the trace of every training stage, by name."""
    traces: dict[str, Trace] = {}
    with _watched(traces, rows=rows):
        execution.run_recipe(recipe, overrides=overrides, out=out)
    return traces


def worst(one: Mapping[str, Trace], many: Mapping[str, Trace]) -> Worst:
    """How far ``many`` is from ``one``, over all tensors of all stages; tensors of next to no size are left out."""
    assert one.keys() == many.keys(), f"stages {sorted(one)} and {sorted(many)}"
    gradients, weights, where = 0.0, 0.0, ""
    for stage, a in one.items():
        b = many[stage]
        assert a.gradients.keys() == b.gradients.keys() and a.after.keys() == b.after.keys(), stage
        scale = max((float(g.double().norm()) for g in a.gradients.values()), default=0.0)
        moved = {n: float((a.after[n].double() - a.before[n].double()).norm()) for n in a.after}
        far = max(moved.values(), default=0.0)
        for name, g in a.gradients.items():
            error = float((b.gradients[name].double() - g.double()).norm())
            found = error / max(float(g.double().norm()), 1e-3 * scale, 1e-30)
            gradients, where = (found, f"{stage}: gradient of {name}") if found > gradients else (gradients, where)
        for name, x in a.after.items():
            error = float((b.after[name].double() - x.double()).norm())
            found = error / max(moved[name], 1e-3 * far, 1e-4 * float(x.double().norm()), 1e-30)  # fp32 rounds
            weights = max(weights, found)
    return Worst(gradients, weights, where)
