"""A path on which some blocks take only the largest entries of their change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clipgraft.errors import InputError
from clipgraft.log import RunLog
from clipgraft_merging.weights.families import block_of
from clipgraft_merging.weights.inputs import Inputs
from clipgraft_merging.wise_ft.interpolation import WiseFt


def largest(change: Tensor, *, keep: float) -> Tensor:
    """The ``keep`` share of entries that is largest by magnitude, the rest 0; ties at the border all stay."""
    if not 0 <= keep <= 1:
        raise InputError(f"keep is {keep:g}; give the share of entries that stays, from 0 to 1")
    count = round(keep * change.numel())
    if count == 0:
        return torch.zeros_like(change)
    border = change.abs().flatten().kthvalue(change.numel() - count + 1).values
    return torch.where(change.abs() >= border, change, 0.0)


@dataclass(frozen=True, kw_only=True)
class SparsePath:
    """WiSE-FT with an ``alpha``, but in ``blocks`` only the ``keep`` largest share of each tensor's change."""

    alpha: float
    blocks: Sequence[str]
    keep: float
    name: str = field(default="merging/sparse-path", init=False)

    def settings(self) -> dict[str, Any]:
        """As they were given."""
        return {"alpha": self.alpha, "blocks": list(self.blocks), "keep": self.keep}

    def prepare(self, inputs: Inputs, log: RunLog) -> None:
        """As WiSE-FT checks it."""
        WiseFt(alpha=self.alpha).prepare(inputs, log)

    def merge(self, key: str, inputs: Inputs) -> Tensor:
        """theta_0 + a * (what is left of theta_1 - theta_0)."""
        if block_of(key) not in self.blocks or self.keep == 1:
            return WiseFt(alpha=self.alpha).merge(key, inputs)
        base = inputs.base_tensor(key)
        left = largest(inputs.tensor(0, key).double() - base, keep=self.keep)
        return base.double().add_(left, alpha=self.alpha) if left.any() and self.alpha else base
