"""``predictions.jsonl``: a header, then a line per picture; written as pictures are finished, so that a stopped

command can go on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipgraft import files
from clipgraft.errors import InputError

NAME = "predictions.jsonl"
SAME = {
    "model_sha256": "the detector",
    "class_name": "--class-name",
    "thresholds": "the threshold",
    "tiles": "--tile or --overlap",
    "maps": "--maps",
    "keep_size": "--keep-size",
}
"""Parts of a header that must be equal for pictures of an earlier call to count, in the words of the command line."""

Line = dict[str, Any]


class Lines:
    """The file in ``folder``. ``done``: {picture: its line} of what is finished."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.done: dict[str, Line] = {}
        self.header: Line = {}

    def begin(self, header: Mapping[str, Any], *, resume: bool) -> None:
        """Start the file, or take up what an earlier call with the same settings finished."""
        header = json.loads(json.dumps(header))
        if self.path.exists() and not resume:
            raise InputError(
                f"{self.path} is there already; say --resume to go on with it, or give another folder with --out"
            )
        if resume and self.path.exists():
            self.header, lines = read_lines(self.path)
            for key, words in SAME.items():
                if self.header.get(key) != header[key]:
                    raise InputError(
                        f"{self.path} was begun differently: {words} differs; give the same, or another folder with "
                        "--out"
                    )
            self.done = {line["file"]: line for line in lines if "error" not in line}
        self.write({**header, "scale": self.header.get("scale")})

    def add(self, line: Line) -> None:
        """A finished picture, or one that can't be read."""
        self.done[line["file"]] = line
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def write(self, header: Mapping[str, Any]) -> None:
        """The whole file anew, pictures sorted by name."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.header = dict(header)
        rows = [{"header": self.header}, *(self.done[name] for name in sorted(self.done))]
        files.write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))


def read_lines(path: Path | str) -> tuple[Line, list[Line]]:
    """The header and the pictures' lines; what a kill cut short is left out."""
    found = []
    for number, text in enumerate(Path(path).read_bytes().splitlines(), start=1):
        try:
            found.append(json.loads(text))
        except ValueError:
            if number == 1:
                break
    if not found or not isinstance(found[0], dict) or "header" not in found[0]:
        raise InputError(f"{path} has no header, so it holds no predictions; give another folder with --out")
    return found[0]["header"], [line for line in found[1:] if isinstance(line, dict) and "file" in line]
