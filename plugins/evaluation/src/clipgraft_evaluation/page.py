"""The HTML pages of this plugin: one file each, nothing on it loads anything or runs a script."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from clipgraft import files
from clipgraft.errors import ClipgraftError
from clipgraft.reporting import Picture, Table

T = TypeVar("T")


def write_page(template: str, path: Path, **content: Any) -> Path:
    """Fill ``template`` of the package's ``page`` folder and write it to ``path``, which is returned."""
    environment = Environment(loader=PackageLoader("clipgraft_evaluation", "page"), autoescape=True,
                              undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    environment.filters |= {"number": number, "signed": signed, "size": size, "span": span, "cell": cell}
    environment.filters |= {"picture": picture_uri, "shades": shades, "wordy": wordy, "breakable": breakable}
    style = resources.files("clipgraft_evaluation").joinpath("page/report.css").read_text("utf-8")
    page = environment.get_template(template).render(style=Markup(style), **content)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, page)
    return path


def told(make: Callable[[], T | None], title: str, missing: list[tuple[str, str]]) -> T | None:
    """A section that needs models or data which may be gone: its failure is told on the page and costs no other."""
    try:
        return make()
    except Exception as error:
        kind = "" if isinstance(error, ClipgraftError) else f"{type(error).__name__}: "
        missing.append((title, " ".join(f"{kind}{error}".split())))
        return None


def number(value: float | None) -> str:
    """Three places for people, two digits of what would be 0.000; a dash for nothing."""
    if value is None:
        return "–"
    return f"{value:.3f}" if 0.0005 <= abs(value) < 1000 or value == 0 else f"{value:.{2 if abs(value) < 1 else 3}g}"


def signed(value: float | None) -> str:
    """As ``number``, with its sign (a true minus)."""
    return "–" if value is None else f"{'+' if value >= 0 else '−'}{number(abs(value))}"


def span(ends: tuple[float, float] | None, *, sign: bool = False) -> str:
    """An interval in brackets; empty for nothing."""
    show = signed if sign else number
    return "" if ends is None or any(map(math.isnan, ends)) else f"[{show(ends[0])}, {show(ends[1])}]"


def size(count: int) -> str:
    """Bytes for people."""
    power = min(int(math.log(count, 1024)), 3) if count else 0
    return f"{count / 1024**power:.{0 if power == 0 else 1}f} {('B', 'kB', 'MB', 'GB')[power]}"


def breakable(name: str) -> Markup:
    """A name that may go on in the next line behind an underscore."""
    return escape(name).replace("_", Markup("_<wbr>"))


def cell(value: str | float, places: int = 3) -> str:
    """A table's cell: words and whole numbers as they are."""
    return f"{value:.{places}f}" if isinstance(value, float) else str(value)


def wordy(table: Table) -> list[bool]:
    """Per column whether it holds words, which begin at the left; numbers end at the right."""
    columns = zip(*table.rows, strict=True) if table.rows else [()] * len(table.header)
    return [any(isinstance(value, str) for value in column) for column in columns]


def shades(table: Table) -> float:
    """The number that is shaded fully: the largest of the table, 1 where none is above zero."""
    numbers = [v for row in table.rows for v in row[1:] if not isinstance(v, str) and math.isfinite(v)]
    return float(max((v for v in numbers if v > 0), default=1.0))


def picture_uri(picture: Picture) -> str:
    """The picture as a data URI. An SVG stays a picture: the browser neither runs nor loads what is in it."""
    data = picture.image.encode() if isinstance(picture.image, str) else picture.image
    return f"data:{picture.media};base64,{base64.b64encode(data).decode()}"


def flat(values: Mapping[str, Any], *, by: str = " ", prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested facts as (name, value) rows; nothing for what isn't set."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, by=by, prefix=f"{prefix}{key}{by}")
        elif value is not None:
            yield f"{prefix}{key}", _written(value)


def _written(value: Any) -> str:
    """As it is written in a configuration."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_written(one)}" for key, one in value.items()) + "}"
    return f"[{', '.join(map(_written, value))}]" if isinstance(value, list | tuple) else str(value)
