"""Scores of weights that were never written: they are streamed into one encoder, which an evaluator measures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from clipgraft.config.schema import EvaluatorNode
from clipgraft.errors import InputError, unknown_name
from clipgraft.log import RunLog
from clipgraft_merging.weights.checkpoints import Checkpoint
from clipgraft_merging.weights.layouts import to_own

if TYPE_CHECKING:
    from clipgraft.encoders.base import Encoder
    from clipgraft.registry import Registry


class Judge(Protocol):
    """A score, more is better, of tensors (canonical name, tensor) that together are a model."""

    def identity(self) -> dict[str, Any]:
        """Plain JSON that tells two judges apart."""

    def __call__(self, state: Iterable[tuple[str, Tensor]]) -> float: ...


class EvaluatorJudge:
    """A metric of an evaluator on data. ``metric`` None takes the evaluator's first.

    The encoder is opened for this alone and only ever holds one candidate.
    """

    def __init__(
        self, checkpoint: Checkpoint, on: EvaluatorNode, *, registry: Registry, data: str | None = None,
        metric: str | None = None, batch_size: int = 256, workers: int | None = None, log: RunLog | None = None,
    ) -> None:  # fmt: skip
        from clipgraft import distributed
        from clipgraft.encoders import load

        self.on, self.data, self.metric, self.registry = on, data, metric, registry
        self.batch_size, self.workers, self.log = batch_size, workers, log
        device = distributed.make_accelerator("fp32").device
        reference = str(checkpoint.folder) if checkpoint.folder is not None else checkpoint.ref
        self.encoder: Encoder = load(reference, registry=registry).eval().requires_grad_(False).to(device)
        self._own = self.encoder.state_dict()

    def identity(self) -> dict[str, Any]:
        """Evaluator, settings, data and metric."""
        return {"on": self.on.use, "settings": dict(self.on.settings), "data": self.on.data or self.data,
                "metric": self.metric}  # fmt: skip

    def __call__(self, state: Iterable[tuple[str, Tensor]]) -> float:
        """Fill the encoder, measure."""
        from clipgraft.evaluation import evaluate

        filled = set()
        with torch.no_grad():
            for key, tensor in state:
                if (own := to_own(key)) not in self._own:
                    raise InputError(f"{self.encoder.data.origin.uri} has no tensor {own}; it can't judge this merge")
                self._own[own].copy_(tensor.reshape(self._own[own].shape))
                filled.add(own)
        if left := sorted(set(self._own) - filled):
            raise InputError(f"the candidate lacks {left[0]}, which the judge's encoder has ({len(left)} such)")
        found = evaluate(
            self.encoder, [self.on], registry=self.registry, default_data=self.data, batch_size=self.batch_size,
            log=self.log, workers=self.workers, spread=False,
        )  # fmt: skip
        (evaluation,) = found.values()
        names = [name for name in evaluation.metrics if name != "skipped"]
        metric = self.metric or names[0]
        if metric not in evaluation.metrics:
            raise unknown_name(f"metric of {self.on.use}", metric, names)
        self.metric = metric
        score = float(evaluation.metrics[metric])
        return -score if metric in evaluation.lower else score


class CallableJudge:
    """A function of a state dict as a judge, for Python code."""

    def __init__(self, score: Callable[[dict[str, Tensor]], float], *, name: str = "function") -> None:
        self.score, self.name = score, name

    def identity(self) -> dict[str, Any]:
        """The name that was given."""
        return {"on": self.name}

    def __call__(self, state: Iterable[tuple[str, Tensor]]) -> float:
        """The function's value on a dict of all tensors."""
        return float(self.score(dict(state)))
