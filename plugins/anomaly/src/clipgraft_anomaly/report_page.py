"""One HTML page about an evaluation: numbers per kind of part, curves, and pictures. Nothing on it loads anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from clipgraft import files
from clipgraft_anomaly.curve_plot import curves_svg
from clipgraft_anomaly.evaluate import Report
from clipgraft_anomaly.overlays import OUTLINE, colour_table
from clipgraft_anomaly.report_cases import Gallery

COLUMNS = {
    "image_auroc": "image\nAUROC",
    "image_ap": "image\nAP",
    "image_f1_max": "image\nF1-max*",
    "pixel_auroc": "pixel\nAUROC",
    "pixel_ap": "pixel\nAP",
    "pixel_f1_max": "pixel\nF1-max*",
    "aupro": "AUPRO\nexact",
    "aupro_legacy": "AUPRO\nlegacy",
}
TILES = {"image_auroc": "image AUROC", "image_ap": "image AP", "pixel_auroc": "pixel AUROC", "aupro": "AUPRO"}
PAGE_COLOURS = {
    '<rect width="100%" height="100%" fill="#fff"/>': "",
    'fill="#333"': 'fill="currentColor"',
    "#e4e4e4": "var(--line)",
    "#777": "var(--muted)",
    "#999": "var(--muted)",
    "#bbb": "var(--muted)",
}
"""What the curves' own file paints for a white page, and what stands there on a page that may be dark."""


def write_page(path: Path, report: Report, document: Mapping[str, Any], pictures: Gallery) -> Path:
    """``document`` is what ``results.json`` holds."""
    environment = Environment(
        loader=PackageLoader("clipgraft_anomaly", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"share": share, "number": number, "lines": lines}
    table = colour_table()
    page = environment.get_template("inspection.html").render(
        style=Markup(resources.files("clipgraft_anomaly").joinpath("page/inspection.css").read_text("utf-8")),
        report=report,
        document=document,
        columns=COLUMNS,
        tiles=TILES,
        curves=inline(curves_svg(report)),
        gallery=pictures,
        stops=", ".join(f"rgb({r} {g} {b})" for r, g, b in table[::15]),
        outline=f"rgb({OUTLINE[0]} {OUTLINE[1]} {OUTLINE[2]})",
        settings=json.dumps(document["detector"], indent=2, ensure_ascii=False, default=list),
    )
    files.write_text(path, page)
    return path


def inline(svg: str) -> Markup:
    """A drawing for a white page as an element of this one."""
    for painted, here in PAGE_COLOURS.items():
        svg = svg.replace(painted, here)
    return Markup(svg.replace(' xmlns="http://www.w3.org/2000/svg"', ""))  # made by curve_plot, which escapes names


def share(value: float | None) -> str:
    """Per cent with one place; a dash for what is undefined."""
    return "–" if value is None else f"{100 * value:.1f}"


def number(value: float) -> str:
    """Three significant places."""
    return f"{value:.3f}" if 0.001 <= abs(value) < 100 or value == 0 else f"{value:.3g}"


def lines(words: str) -> Markup:
    """Line breaks where the text has them."""
    return Markup("<br>").join(escape(line) for line in words.split("\n"))
