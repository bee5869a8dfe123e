"""Put what ``clipgraft claims`` wrote into docs/claims.md: sections and plots of the claims in the folders given.

    python docs/claims_page.py [FOLDER ...]    # default: runs/claims

Sections of other claims stay as they are. The table at the top, with what people should know beside the numbers, is
written by hand: a claim that it lacks, or of which it tells another verdict than the section, is an error.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

PAGE = Path(__file__).parent / "claims.md"
HEADING = re.compile(r"^## (?P<name>[\w/-]+): (?P<verdict>.+)$", re.MULTILINE)
ROW = re.compile(r"^\| `(?P<name>[\w/-]+)` \| (?P<verdict>[^|,]+)", re.MULTILINE)


def sections(text: str) -> dict[str, str]:
    """Sections of a page by the name of their claim, in order, each with its heading."""
    found = [*HEADING.finditer(text)]
    ends = [*(match.start() for match in found[1:]), len(text)]
    return {match["name"]: text[match.start() : end].strip() for match, end in zip(found, ends, strict=True)}


def composed(page: str, parts: Sequence[str]) -> str:
    """``page`` with the sections of ``parts`` in place of its own; new ones come last."""
    kept = sections(page)
    for part in parts:
        kept |= sections(part)
    first = HEADING.search(page)
    head = page[: first.start()] if first else page
    return head.rstrip() + "\n\n" + "\n\n".join(kept.values()) + "\n"


def problems(page: str) -> list[str]:
    """What the table says otherwise than the sections."""
    told = {row["name"]: row["verdict"].strip() for row in ROW.finditer(page)}
    found = {match["name"]: match["verdict"].strip() for match in HEADING.finditer(page)}
    lines = [f"{name} has no row in the table" for name in found if name not in told]
    lines += [f"{name} has a row in the table, but no section" for name in told if name not in found]
    both = told.keys() & found.keys()
    return lines + [
        f"{name}: the table says {told[name]}, its section {found[name]}"
        for name in sorted(both)
        if told[name] != found[name]
    ]


def main(folders: Sequence[str]) -> int:
    """Write the page and copy the plots; 1 when the table has to be mended."""
    places = [Path(folder) for folder in folders or ("runs/claims",)]
    if missing := [place for place in places if not (place / "claims.md").is_file()]:
        print(f"{missing[0]} holds no claims.md; run clipgraft claims --out {missing[0]} first", file=sys.stderr)
        return 2
    parts = [(place / "claims.md").read_text("utf-8") for place in places]
    text = composed(PAGE.read_text("utf-8"), parts)
    PAGE.write_text(text, "utf-8")
    for place, part in zip(places, parts, strict=True):
        for plot in re.findall(r"\]\(([\w-]+\.svg)\)", part):
            shutil.copyfile(place / plot, PAGE.parent / plot)
    for line in (found := problems(text)):
        print(line, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
