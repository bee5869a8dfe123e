"""Tables of the benchmarks: aligned for a terminal, or in markdown as the pages want them."""

from __future__ import annotations

from collections.abc import Sequence

Row = Sequence[object]


def table(header: Sequence[str], rows: Sequence[Row], *, left: int = 1, markdown: bool = False) -> str:
    """The rows under their header; all columns but the first ``left`` are numbers, so they stand at the right."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[k]) for row in cells) for k in range(len(header))]
    lines = [
        [
            cell.ljust(width) if k < left else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(r, widths, strict=True))
        ]
        for r in cells
    ]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in lines)
    rule = [*["---"] * left, *["--:"] * (len(header) - left)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])
