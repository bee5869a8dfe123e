"""Scores of points on a path, on several data sets, with one encoder in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clipgraft.config.schema import EvaluatorNode
from clipgraft.errors import InputError
from clipgraft.log import RunLog
from clipgraft_merging.scores import Scores
from clipgraft_merging.weights.checkpoints import Checkpoint
from clipgraft_merging.weights.engine import merge_state
from clipgraft_merging.weights.families import block_of
from clipgraft_merging.weights.inputs import Inputs
from clipgraft_merging.weights.layouts import to_own
from clipgraft_merging.wise_ft.interpolation import WiseFt

if TYPE_CHECKING:
    from clipgraft.registry import Registry


@dataclass(frozen=True, slots=True)
class PathPoint:
    """A model on the path: ``scores`` {name of the data: metric}; ``block`` is empty where every tensor is at a."""

    alpha: float
    scores: Mapping[str, float]
    block: str = ""


class PathMeter:
    """An evaluator on named data. The encoder holds whatever point was filled in last."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        on: EvaluatorNode,
        *,
        data: Mapping[str, str],
        registry: Registry,
        metric: str | None = None,
        batch_size: int = 256,
        workers: int | None = 0,
        log: RunLog | None = None,
    ) -> None:
        from clipgraft import distributed
        from clipgraft.encoders import load

        reference = str(checkpoint.folder) if checkpoint.folder is not None else checkpoint.ref
        device = distributed.make_accelerator("fp32").device
        self.encoder = load(reference, registry=registry).eval().requires_grad_(False).to(device)
        self.scored = Scores(
            on, data=data, registry=registry, metric=metric, batch_size=batch_size, workers=workers, log=log
        )
        self._own = self.encoder.state_dict()

    def fill(self, state: Iterable[tuple[str, Tensor]]) -> None:
        """Take over tensors by canonical name."""
        with torch.no_grad():
            for key, tensor in state:
                if (own := to_own(key)) not in self._own:
                    raise InputError(f"{self.encoder.data.origin.uri} has no tensor {own}; the path can't be measured")
                self._own[own].copy_(tensor.reshape(self._own[own].shape))

    def at(self, inputs: Inputs, merger: WiseFt) -> dict[str, float]:
        """Scores of one point."""
        self.fill(merge_state(inputs, merger))
        return self.scored.of(self.encoder)


def blocks_of(inputs: Inputs) -> list[str]:
    """Blocks in which the two models differ, as "visual.3", "text", in the order of their names."""
    moved: dict[str, bool] = {}
    for key in inputs.float_keys:
        name = block_of(key)
        if not moved.get(name):
            moved[name] = not torch.equal(inputs.base_tensor(key), inputs.tensor(0, key))
    return [name for name in moved if moved[name]]


def measure_path(
    inputs: Inputs,
    meter: PathMeter,
    *,
    alphas: Sequence[float],
    blocks: Sequence[str] = (),
    rest: float = 1.0,
    log: RunLog | None = None,
) -> list[PathPoint]:
    """The whole path, then for each block the path on which it alone moves while all others stay at ``rest``."""
    log, points = log or RunLog(is_main=False), list[PathPoint]()
    with log.progress("path", len(alphas) * (1 + len(blocks))) as bar:
        for block in ("", *blocks):
            for a in alphas:
                at = WiseFt(alpha=a) if not block else replace(WiseFt(alpha=rest), blocks={block: a})
                points.append(PathPoint(a, meter.at(inputs, at), block))
                bar.advance(note=f"{block or 'whole'} {a:g}")
    return points
