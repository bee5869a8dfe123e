"""Figures of this plugin: transparent SVG that reads well on a light and on a dark page, and a PNG beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GRID = "#777d87", "#777d8844"
SERIES = ("#8a919e", "#3f7fe0", "#c96a1b", "#1f9d76", "#a45bc4", "#c2435a")
"""The first is for what was there before."""

SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "clipgraft",  # the same figure is the same file
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}


def panels(number: int, *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of ``number`` axes side by side; sizes in CSS pixels of the whole."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(width / 96, height / 96), dpi=96, layout="constrained")
        figure.patch.set_alpha(0)
        axes = list(figure.subplots(1, number, squeeze=False)[0])
        for axis in axes:
            axis.patch.set_alpha(0)
    return figure, axes


def head(axis: Axes, title: str) -> None:
    """A title in the left corner."""
    axis.set_title(title, loc="left", fontsize=10, color=INK)


def save(figure: Figure, path: Path) -> Path:
    """``path`` as SVG, and the same name as PNG on white."""
    import matplotlib

    with matplotlib.rc_context(SETTINGS):
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(path.with_suffix(".png"), format="png", dpi=144, facecolor="white")
    return path
