"""ROC and PRO curves as one SVG, a panel each, a line per kind of part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from clipgraft_anomaly.evaluate import Curve, Report
from clipgraft_anomaly.metrics import PRO_LIMIT

SIDE, EDGE, LEGEND = 300, 58, 18
"""Side of a panel, room for its numbers, height of a line of the legend [px]."""
COLOURS = ("#3b6fb6", "#c8553d", "#4f9d69", "#8a63a8", "#b8860b", "#3d8b8b", "#a14a76", "#6b6b6b")
DASHES = ("", "6 3", "2 3")
TITLES = {
    "image ROC": ("Pictures: ROC", "false positive rate", "share of anomalous pictures found"),
    "pixel ROC": ("Pixels: ROC", "false positive rate", "share of damaged pixels found"),
    "PRO": ("Regions: PRO", "false positive rate (pixels)", "mean share of a region found"),
}


def curves_svg(report: Report) -> str:
    """All panels that have a curve; empty text when none has."""
    panels = {kind: {p.object: p.curves[kind] for p in report.parts if kind in p.curves} for kind in TITLES}
    panels = {kind: lines for kind, lines in panels.items() if lines}
    if not panels:
        return ""
    objects = [part.object for part in report.parts if part.curves]
    style = {name: (COLOURS[k % len(COLOURS)], DASHES[k // len(COLOURS) % 3]) for k, name in enumerate(objects)}
    width, step = EDGE + (SIDE + EDGE) * len(panels), SIDE + EDGE
    columns = max(1, width // 180)
    height = SIDE + 2 * EDGE + LEGEND * (1 + (len(objects) - 1) // columns)
    drawn = "".join(_panel(kind, lines, style, EDGE + k * step) for k, (kind, lines) in enumerate(panels.items()))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="system-ui, sans-serif" font-size="11" fill="#333"><rect width="100%" height="100%" fill="#fff"/>'
        f"{drawn}{_legend(objects, style, columns)}</svg>\n"
    )


def _panel(kind: str, lines: Mapping[str, Curve], style: Mapping[str, tuple[str, str]], left: int) -> str:
    """Frame, diagonal or limit, lines and words."""
    title, across, up = TITLES[kind]
    top, parts = EDGE // 2, list[str]()
    for tick in (0, 0.25, 0.5, 0.75, 1):
        x, y = left + tick * SIDE, top + (1 - tick) * SIDE
        parts.append(f'<path d="M{x:.1f} {top}v{SIDE}M{left} {y:.1f}h{SIDE}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{x:.1f}" y="{top + SIDE + 13}" text-anchor="middle">{tick:g}</text>')
        parts.append(f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    if kind == "PRO":
        x = left + PRO_LIMIT * SIDE
        parts.append(f'<path d="M{x:.1f} {top}v{SIDE}" stroke="#999" stroke-dasharray="3 3"/>')
        parts.append(f'<text x="{x + 4:.1f}" y="{top + SIDE - 6}" fill="#777">AUPRO ends here</text>')
    else:
        parts.append(f'<path d="M{left} {top + SIDE}L{left + SIDE} {top}" stroke="#bbb" stroke-dasharray="3 3"/>')
    for name, (xs, ys) in lines.items():
        colour, dash = style[name]
        points = " ".join(f"{left + x * SIDE:.1f},{top + (1 - y) * SIDE:.1f}" for x, y in zip(xs, ys, strict=True))
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6" stroke-dasharray="{dash}">'
            f"<title>{escape(name)}</title></polyline>"
        )
    middle = left + SIDE / 2
    parts.append(f'<text x="{middle}" y="{top - 7}" text-anchor="middle" font-weight="600">{title}</text>')
    parts.append(f'<text x="{middle}" y="{top + SIDE + 27}" text-anchor="middle">{across}</text>')
    turn = f"translate({left - 38} {top + SIDE / 2}) rotate(-90)"
    parts.append(f'<text transform="{turn}" text-anchor="middle">{up}</text>')
    return "".join(parts)


def _legend(objects: Sequence[str], style: Mapping[str, tuple[str, str]], columns: int) -> str:
    """Names below the panels."""
    parts = []
    for k, name in enumerate(objects):
        x, y = EDGE + 180 * (k % columns), SIDE + EDGE + 22 + LEGEND * (k // columns)
        colour, dash = style[name]
        parts.append(f'<path d="M{x} {y - 4}h22" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>')
        parts.append(f'<text x="{x + 28}" y="{y}">{escape(name[:24])}</text>')
    return "".join(parts)
