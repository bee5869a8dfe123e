"""The plot of a claim: one dot per seed and arm for every metric of its rule, with what the rule asks for."""

from __future__ import annotations

import statistics
from pathlib import Path

from matplotlib.axes import Axes

from clipgraft_evaluation.figures import INK, SERIES, head, panels, save
from clipgraft_evaluation.verdict import Verdict


def claim_plot(verdict: Verdict, out: Path) -> Path:
    """Write ``<claim>.svg`` into ``out``. The dashed line is where the mean of "after" has to be, or beyond."""
    claim = verdict.claim
    arms = ["before", *(arm.name for arm in claim.controls), "after"]
    figure, axes = panels(len(claim.metrics), width=120 + 230 * len(claim.metrics), height=86 + 26 * len(arms))
    for axis, metric in zip(axes, claim.metrics, strict=True):
        _dots(axis, verdict, metric, arms)
        needed = [_mean(verdict, g.over, metric) + g.at_least for g in claim.gains if g.metric == metric]
        needed += [k.share * _mean(verdict, "before", metric) for k in claim.kept if k.metric == metric]
        axis.axvline(max(needed), color=INK, linestyle=(0, (4, 3)), linewidth=1.2)
        axis.text(max(needed), len(arms) - 0.5, " needed", va="top", fontsize=8, color=INK)
        head(axis, metric)
        axis.margins(x=0.12)
    for axis in axes[1:]:
        axis.set_yticklabels([])
    return save(figure, out / f"{claim.name.replace('/', '-')}.svg")


def _dots(axis: Axes, verdict: Verdict, metric: str, arms: list[str]) -> None:
    """One row per arm from the top: a dot per seed, in seed order, and a bar at the mean."""
    for row, arm in enumerate(reversed(arms)):
        values = verdict.arms[arm][metric]
        color = {"before": SERIES[0], "after": SERIES[1]}.get(arm, SERIES[2])
        heights = [row + 0.1 * ((len(values) - 1) / 2 - seed) for seed in range(len(values))]
        axis.plot([_mean(verdict, arm, metric)] * 2, [row - 0.3, row + 0.3], color=color, linewidth=2.4)
        axis.plot(values, heights, "o", color=color, markersize=5, alpha=0.75, markeredgewidth=0)
    axis.set_yticks(range(len(arms)), labels=list(reversed(arms)))
    axis.set_ylim(-0.6, len(arms) - 0.4)
    axis.grid(axis="y", visible=False)


def _mean(verdict: Verdict, arm: str, metric: str) -> float:
    return statistics.fmean(verdict.arms[arm][metric])
