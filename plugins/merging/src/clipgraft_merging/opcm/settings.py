"""How models are merged one after another, and with what they are scaled back."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from clipgraft.errors import InputError
from clipgraft_merging.opcm.projection import Compat, Mode, check_alpha

Method = Literal["opcm", "task-arithmetic", "average", "rescaled", "ties"]
Qkv = Literal["split", "fused"]


@dataclass(frozen=True, kw_only=True)
class ContinualSettings:
    """A way to merge models that arrive one at a time; S is the sum so far, in task vectors, and theta_0 the base.

    | method | S becomes | the model is |
    |---|---|---|
    | opcm | S + P(tau), eq. of the paper in sums | theta_0 + S mean|tau| / |S| |
    | rescaled | S + tau: OPCM without its projection | theta_0 + S mean|tau| / |S| |
    | task-arithmetic | S + tau | theta_0 + scale S |
    | average | S + tau | theta_0 + S / t |
    | ties | S + scale TIES(S, tau) | theta_0 + S |

    ``alpha``, ``mode``, ``qkv`` and ``compat`` are opcm's; ``scale`` is that of task-arithmetic and ties, ``density``
    that of ties. ``qkv`` fused projects the stack of q, k and v as one matrix, which is another algorithm. ``compat``
    "fusionbench" reproduces the official code on Hugging Face's model: the class token's embedding and the scales take
    nothing from the second model on, zero layers lose the literal diagonal, directions without energy are kept.
    """

    method: Method = "opcm"
    alpha: float = 0.5
    mode: Mode = "code"
    qkv: Qkv = "split"
    compat: Compat = "none"
    scale: float = 0.3
    density: float = 0.2

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        for name, value, kind in (
            ("method", self.method, Method),
            ("mode", self.mode, Mode),
            ("qkv", self.qkv, Qkv),
            ("compat", self.compat, Compat),
        ):
            if value not in get_args(kind):
                raise InputError(f"{name} is {value!r}; expected one of {', '.join(get_args(kind))}")
        if self.compat != "none" and self.qkv != "split":
            raise InputError(
                "compat fusionbench works on Hugging Face's q, k and v, which are split; leave qkv at split"
            )
        if not 0 < self.density <= 1:
            raise InputError(
                f"density is {self.density:g}; give the share of entries that TIES keeps, above 0, at most 1"
            )

    def as_dict(self) -> dict[str, Any]:
        """What the method reads, as plain JSON."""
        used = {
            "opcm": ("alpha", "mode", "qkv", "compat"),
            "task-arithmetic": ("scale",),
            "ties": ("scale", "density"),
        }.get(self.method, ())
        return {k: v for k, v in asdict(self).items() if k == "method" or k in used}
