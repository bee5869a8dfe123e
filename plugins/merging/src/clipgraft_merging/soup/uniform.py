"""The uniform soup: the mean of all models, theta = 1/N sum_i theta_i."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from clipgraft.log import RunLog
from clipgraft_merging.weights.inputs import Inputs
from clipgraft_merging.weights.linear import mean


class UniformSoup:
    """Section 3.1. Summed in fp64: N copies of a model give it back bit for bit, and the order doesn't matter."""

    name = "merging/soup"

    def settings(self) -> dict[str, Any]:
        """Nothing to set."""
        return {}

    def prepare(self, inputs: Inputs, log: RunLog) -> None:
        """One pass is enough."""

    def merge(self, key: str, inputs: Inputs) -> Tensor:
        """The mean of the models' tensors; a base takes no part."""
        return mean(key, inputs, range(len(inputs.models)))
