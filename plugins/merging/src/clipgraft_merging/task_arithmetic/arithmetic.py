"""theta = theta_0 + sum_i s_i tau_i with tau_i = theta_i - theta_0."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from clipgraft.errors import InputError
from clipgraft.log import RunLog
from clipgraft_merging.weights.inputs import BASE, Inputs
from clipgraft_merging.weights.linear import combine


@dataclass(frozen=True, kw_only=True)
class TaskArithmetic:
    """``scales``: one for all models, or one each. Negative ones forget; +1 +1 -1 is an analogy (section 2).

    Computed as (1 - sum s) theta_0 + sum s_i theta_i, so that s = 0 is the base and one model with s = 1 is that model,
    bit for bit.
    """

    scales: Sequence[float] = (0.3,)
    name: str = field(default="merging/task-arithmetic", init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", tuple(float(s) for s in self.scales))
        if not self.scales or not all(math.isfinite(s) for s in self.scales):
            raise InputError(f"scales are {list(self.scales)}; expected one number, or one per model")

    def settings(self) -> dict[str, Any]:
        """As they were given."""
        return {"scales": list(self.scales)}

    def prepare(self, inputs: Inputs, log: RunLog) -> None:
        """One pass is enough; the count of scales is checked."""
        if inputs.base is None:
            raise InputError("task vectors start at the model that was fine-tuned; give --base MODEL")
        if len(self.scales) not in (1, len(inputs.models)):
            raise InputError(f"{len(self.scales)} scales for {len(inputs.models)} models; give one, or one per model")

    def merge(self, key: str, inputs: Inputs) -> Tensor:
        """The combination; models of scale 0 are not read."""
        scales = self.scales if len(self.scales) > 1 else self.scales * len(inputs.models)
        rest = 1 - math.fsum(scales)
        rest = 0.0 if abs(rest) < 1e-12 else rest
        return combine(key, inputs, [(rest, BASE), *((scale, index) for index, scale in enumerate(scales))])
