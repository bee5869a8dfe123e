"""Trim, elect, merge, one tensor at a time: two passes for the thresholds, one for the rest, any number of models."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor

from clipgraft.errors import InputError
from clipgraft.log import RunLog
from clipgraft_merging.ties.threshold import OrderStatistic
from clipgraft_merging.weights.inputs import BASE, Inputs
from clipgraft_merging.weights.linear import pieces

Keep = Literal["strict", "compat"]
Reduce = Literal["mean", "sum"]


def kept(total: int, density: float, *, keep: Keep) -> int:
    """How many of ``total`` numbers stay: ceil(d K), or the int(d K) + 1 of the official code."""
    # a fraction, because 0.07 * 100 is a hair above 7 in binary and must keep 7
    count = math.ceil(Fraction(repr(density)) * total) if keep == "strict" else int(total * density) + 1
    return min(max(count, 1), total)


@dataclass(kw_only=True)
class Ties:
    """``density`` K in (0, 1] is the share of each task vector that stays, by magnitude over the whole model.

    ``keep`` compat keeps one number more than K says, as the official code does; numbers that tie with the threshold
    all stay. ``merge_by`` mean is the paper's, sum is what FusionBench does by default (with a scale of 0.3: the two
    are not interchangeable). Where elected signs cancel to zero, the sign of most elected signs decides.
    """

    density: float = 0.2
    scale: float = 1.0
    keep: Keep = "strict"
    merge_by: Reduce = "mean"
    name: str = field(default="merging/ties", init=False)
    thresholds: tuple[float, ...] = field(default=(), init=False)
    """The smallest magnitude that stays, per model, after ``prepare``."""
    _signs: int = field(default=0, init=False, repr=False)
    _tied: list[str] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise InputError(f"density {self.density} is no share; 20 percent is written 0.2, all is 1")
        if self.keep not in ("strict", "compat") or self.merge_by not in ("mean", "sum"):
            raise InputError(f"keep {self.keep!r}, merge {self.merge_by!r}: expected strict or compat, mean or sum")
        if not math.isfinite(self.scale):
            raise InputError(f"scale {self.scale} is no number that a model can be scaled by")

    def settings(self) -> dict[str, Any]:
        """As they were given."""
        return {"density": self.density, "scale": self.scale, "keep": self.keep, "merge": self.merge_by}

    def prepare(self, inputs: Inputs, log: RunLog) -> None:
        """Two passes: the exact threshold of each model's task vector."""
        if inputs.base is None:
            raise InputError("task vectors start at the model that was fine-tuned; give --base MODEL")
        self._signs, self._tied = 0, []
        statistics = [OrderStatistic() for _ in inputs.models]
        keys = inputs.float_keys
        with log.progress("thresholds (merging/ties)", total=2 * len(keys)) as bar:
            for key in keys:
                for start, stop in pieces(key, inputs):
                    for each, tau in zip(statistics, task_vectors(key, inputs, start, stop), strict=True):
                        each.look(tau)
                bar.advance(note=key)
            for each in statistics:
                each.aim(each.total - kept(each.total, self.density, keep=self.keep) + 1)
            for key in keys:
                for start, stop in pieces(key, inputs):
                    for each, tau in zip(statistics, task_vectors(key, inputs, start, stop), strict=True):
                        each.look_closer(tau)
                bar.advance(note=key)
        self.thresholds = tuple(each.value for each in statistics)

    def merge(self, key: str, inputs: Inputs) -> Tensor:
        """theta_0 + scale * what agrees with the elected signs."""
        merged, signs, tied = self._merge(key, inputs, zero_sign=0)
        self._signs += signs
        if tied:
            self._tied.append(key)
        return merged

    def rewrites(self, inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
        """Tensors with a tie of signs, once most of all elected signs is known."""
        if self._signs:
            for key in self._tied:
                yield key, self._merge(key, inputs, zero_sign=1 if self._signs > 0 else -1)[0]

    def _merge(self, key: str, inputs: Inputs, *, zero_sign: int) -> tuple[Tensor, int, bool]:
        """The merged tensor, the sum of its elected signs, and whether one of them is zero for a tie."""
        if self.scale == 0:
            return inputs.base_tensor(key), 0, False
        found = torch.empty(inputs.shape(key), dtype=inputs.dtype(key))
        flat, signs, any_tied = found.view(-1), 0, False
        for start, stop in pieces(key, inputs):
            up, down = (torch.zeros(stop - start, dtype=torch.float64) for _ in range(2))
            ups, downs = (torch.zeros(stop - start, dtype=torch.int32) for _ in range(2))
            for tau, threshold in zip(task_vectors(key, inputs, start, stop), self.thresholds, strict=True):
                tau[tau.abs() < threshold] = 0
                up += tau.clamp_min(0)
                down += tau.clamp_max(0)
                ups += tau > 0
                downs += tau < 0
            sign = torch.sign(up + down)
            tied = (sign == 0) & (ups > 0)
            signs += int(sign.sum())
            any_tied |= bool(tied.any())
            if zero_sign:
                sign[tied] = zero_sign
            if self.merge_by == "mean":
                up /= ups.clamp_min(1)
                down /= downs.clamp_min(1)
            merged = torch.where(sign > 0, up, torch.where(sign < 0, down, 0.0))
            flat[start:stop] = merged.mul_(self.scale).add_(inputs.piece(BASE, key, start, stop))
        return found, signs, any_tied


def task_vectors(key: str, inputs: Inputs, start: int, stop: int) -> Iterator[Tensor]:
    """Numbers of tau_i = theta_i - theta_0 in fp32, a model at a time, free to be changed."""
    base = inputs.piece(BASE, key, start, stop).float()
    for index in range(len(inputs.models)):
        yield inputs.piece(index, key, start, stop).float() - base
