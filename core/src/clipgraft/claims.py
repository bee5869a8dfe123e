"""Claims: a paper's statement as an experiment with control arms, a rule that is written first, and its verdict."""

from __future__ import annotations

import re
from dataclasses import dataclass

from clipgraft.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A recipe with overrides, run on every seed of its claim."""

    name: str
    recipe: str
    overrides: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Gain:
    """The method must exceed ``over`` (a control's name, or "before") in ``metric`` ("evaluator.metric").

    A negative ``at_least`` allows a loss: the method is not inferior by more, and the test asks whether that is sure.
    """

    metric: str
    over: str
    at_least: float


@dataclass(frozen=True, kw_only=True)
class Kept:
    """After the method, ``metric`` must be at least ``share`` of what it was before."""

    metric: str
    share: float


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One statement of one paper. ``budget``: seconds on two cores at three seeds; ``tried``: what didn't help."""

    name: str
    statement: str
    paper: str
    bases: tuple[str, ...]
    method: Arm
    controls: tuple[Arm, ...]
    gains: tuple[Gain, ...]
    kept: tuple[Kept, ...]
    budget: float
    alpha: float = 0.05
    tried: str = ""
    shares: str = ""  # claims with the same folder name here take up each other's arms of the same name

    def __post_init__(self) -> None:
        names = {arm.name for arm in self.arms if re.fullmatch(r"\w[\w.-]*", arm.name)} - {"before", "after"}
        if len(names) < len(self.arms):
            raise InputError(f"claim {self.name!r}: arms need different names of letters, not 'before' or 'after'")
        references = ["before", *(arm.name for arm in self.controls)]
        if not self.bases or not self.gains or any(gain.over not in references for gain in self.gains):
            raise InputError(f"claim {self.name!r} needs bases, and gains over one of: {', '.join(references)}")

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The method first, then the controls."""
        return (self.method, *self.controls)

    @property
    def metrics(self) -> tuple[str, ...]:
        """What the rule reads, each once."""
        return tuple(dict.fromkeys([g.metric for g in self.gains] + [k.metric for k in self.kept]))

    @property
    def rule(self) -> str:
        """When the claim holds, in words."""
        parts = [
            f"after exceeds {g.over} in {g.metric} by {g.at_least:g} or more"
            if g.at_least >= 0
            else f"after is less than {-g.at_least:g} below {g.over} in {g.metric}"
            for g in self.gains
        ]
        parts += [f"{k.metric} keeps {k.share:.1%} of before or more" for k in self.kept]
        test = f"every gain has p < {self.alpha:g} in a one-sided paired t-test over at least two seeds"
        if any(g.at_least < 0 for g in self.gains):
            test += ", which for an allowed loss tests that it is smaller than allowed"
        return f"Holds if, in the mean over seeds, {'; '.join(parts)}; and {test}."
