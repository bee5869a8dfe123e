"""What commands print: one JSON document, or aligned columns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one setting.")]


def emit(document: Any) -> None:
    """Print ``document`` as JSON."""
    print(json.dumps(document, indent=2, ensure_ascii=False, default=str))


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Print the columns of ``rows`` aligned under their names; null, true and false as a config spells them."""
    spelt = {"None": "null", "True": "true", "False": "false"}
    cells = [list(columns), *([spelt.get(str(row[c]), str(row[c])) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
