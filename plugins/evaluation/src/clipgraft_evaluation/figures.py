"""Figures that read well on a light and on a dark page: transparent, thin lines, text in the colour of the page."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, GRID = "#777d87", "#777d8844"
"""Readable on both backgrounds; inside a page ``INK`` becomes the page's own muted colour."""

SERIES = ("#8a919e", "#3f7fe0", "#c96a1b", "#1f9d76", "#a45bc4", "#c2435a")
"""The first is for "before", the second for the method."""

_SETTINGS: Any = {
    "svg.fonttype": "none",  # text stays text: it takes the page's font and screen readers find it
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
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(width / 96, height / 96), dpi=96, layout="constrained")
        figure.patch.set_alpha(0)
        axes = list(figure.subplots(1, number, squeeze=False)[0])
        for axis in axes:
            axis.patch.set_alpha(0)
            axis.locator_params(nbins=5)
    return figure, axes


def svg_text(figure: Figure) -> str:
    """The figure as an SVG document."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_SETTINGS):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def inline(figure: Figure, *, name: str, label: str) -> Markup:
    """The figure as an SVG element for a page: no outside reference, ids of its own, ``label`` as its alt text."""
    text = svg_text(figure)
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|^\s+", "", text, flags=re.S | re.M)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = text.replace("xlink:href", "href").replace(INK, "var(--muted)")
    text = re.sub(
        r"<style.*?</style>|font-family: [^;\"]*; ?", "", text, flags=re.S
    )  # neither may leak from or to the page
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    width = figure.get_figwidth() * 96
    opening = Markup('<svg role="img" aria-label="{}" style="max-width: {:.0f}px" ').format(label, width)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    return opening + Markup(text.removeprefix("<svg").lstrip())


def save(figure: Figure, path: Path) -> Path:
    """The figure as an SVG file of its own."""
    path.write_text(svg_text(figure), "utf-8")
    return path


def smooth(values: Sequence[float], *, window: int) -> list[float]:
    """Centred running mean over ``window`` values, narrower at the ends; not-a-number is skipped."""
    half, means = window // 2, []
    for index in range(len(values)):
        near = [v for v in values[max(0, index - half) : index + half + 1] if v == v]
        means.append(sum(near) / len(near) if near else float("nan"))
    return means


def curve(
    axis: Axes,
    steps: Sequence[float],
    values: Sequence[float],
    *,
    title: str,
    color: str = SERIES[1],
    label: str = "",
) -> None:
    """One curve: every value faintly, its running mean on top; ``label`` is its name in a legend."""
    window = max(1, len(values) // 20)
    if window > 1:
        axis.plot(steps, values, color=color, alpha=0.3, linewidth=0.8)
    axis.plot(steps, smooth(values, window=window), color=color, marker="o" if len(values) == 1 else "", label=label)
    head(axis, title)
    axis.margins(x=0.01)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.ticklabel_format(axis="y", scilimits=(-2, 4))
    axis.yaxis.get_offset_text().set_fontsize(8)


def head(axis: Axes, title: str) -> None:
    """A title in the left corner."""
    axis.set_title(title, loc="left", fontsize=10, color=INK)
