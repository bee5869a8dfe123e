"""theta(a) = (1 - a) theta_0 + a theta_1 over every tensor: one a for all or one per block, Fisher-weighted or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from clipgraft.errors import InputError, unknown_name
from clipgraft.log import RunLog
from clipgraft_merging.weights.checkpoints import Checkpoint
from clipgraft_merging.weights.families import block_of
from clipgraft_merging.weights.inputs import BASE, Inputs
from clipgraft_merging.weights.linear import combine

FISHER_FLOOR = 1e-6


@dataclass(frozen=True, kw_only=True)
class WiseFt:
    """Between the base, a = 0, and one fine-tuned model, a = 1; both ends are bit-exact.

    ``blocks`` {pattern: a} sets a for tensors whose canonical name or block ("visual.3", "text.*") matches, first match
    wins. a outside [0, 1] needs ``extrapolate``. ``fishers`` (F_0, F_1) are checkpoints that hold a non-negative
    importance per number; weights are then (1 - a) max(F_0, floor) and a max(F_1, floor), normalised.
    """

    alpha: float = 0.5
    blocks: Mapping[str, float] = field(default_factory=dict)
    extrapolate: bool = False
    fishers: tuple[Checkpoint, Checkpoint] | None = None
    floor: float = FISHER_FLOOR
    name: str = field(default="merging/wise-ft", init=False)

    def __post_init__(self) -> None:
        for a in (self.alpha, *self.blocks.values()):
            if not self.extrapolate and not 0 <= a <= 1:
                raise InputError(f"alpha {a} lies outside of [0, 1]; give --extrapolate to go beyond either model")
        if self.fishers is not None and self.extrapolate:
            raise InputError("Fisher weights are a mean, which has no outside; leave out --extrapolate or the Fishers")
        if self.floor <= 0:
            raise InputError(f"the Fisher floor is {self.floor}; it must be above 0")

    def settings(self) -> dict[str, Any]:
        """As they were given."""
        fishers = None if self.fishers is None else [{"uri": f.ref, "sha256": f.sha256} for f in self.fishers]
        fisher = {} if fishers is None else {"fishers": fishers, "floor": self.floor}
        return {"alpha": self.alpha, "blocks": dict(self.blocks), "extrapolate": self.extrapolate, **fisher}

    def prepare(self, inputs: Inputs, log: RunLog) -> None:
        """Nothing is read; what was given is checked against the models."""
        if inputs.base is None or len(inputs.models) != 1:
            raise InputError("WiSE-FT goes from a base to one fine-tuned model; give --base BASE and one MODEL")
        for pattern in self.blocks:
            if not any(_matches(pattern, key) for key in inputs.float_keys):
                blocks = {block_of(key) for key in inputs.float_keys}
                raise unknown_name("block or tensor", pattern, blocks)
        if self.fishers is not None:
            Inputs(self.fishers[0], (self.fishers[1],))
            if set(self.fishers[0].places) != set(inputs.reference.places):
                raise InputError(f"{self.fishers[0].ref} holds other tensors than {inputs.reference.ref}")

    def alpha_of(self, key: str) -> float:
        """a of one tensor."""
        return next((a for pattern, a in self.blocks.items() if _matches(pattern, key)), self.alpha)

    def merge(self, key: str, inputs: Inputs) -> Tensor:
        """(1 - a) theta_0 + a theta_1; in this form the middle is exactly the mean."""
        a = self.alpha_of(key)
        if self.fishers is None or a in (0, 1):
            return combine(key, inputs, [(1 - a, BASE), (a, 0)])
        old, new = (f.tensor(key).double().clamp_min(self.floor) for f in self.fishers)
        share = old.mul_(1 - a).add_(new.mul_(a)).reciprocal_().mul_(new)  # c_1 / (c_0 + c_1)
        base, tuned = inputs.base_tensor(key), inputs.tensor(0, key)
        return (base.double() * (1 - share)).add_(share.mul_(tuned)).to(base.dtype)


def _matches(pattern: str, key: str) -> bool:
    return fnmatchcase(key, pattern) or fnmatchcase(block_of(key), pattern)
