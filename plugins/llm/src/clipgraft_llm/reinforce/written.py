"""Written captions by sample id: JSON lines ``{"id": "000123.jpg", "captions": ["...", "..."]}``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from clipgraft import files
from clipgraft.errors import InputError


class WrittenCaptions:
    """A file that a captioner or a language model wrote; ``sha256`` of it."""

    def __init__(self, path: str | Path) -> None:
        file = Path(path).expanduser()
        self.found: dict[str, tuple[str, ...]] = {}
        try:
            self.sha256 = files.sha256_of(file)
            lines = file.read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise InputError(f"{path} can't be read ({reason}); expected JSON lines with id and captions") from None
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                raise InputError(f"{path} line {number} is no JSON; expected id and captions in every line") from None
            if not isinstance(row, Mapping) or "id" not in row or not isinstance(row.get("captions"), list):
                raise InputError(f"{path} line {number}: expected id and a list captions")
            told = (*self.found.get(str(row["id"]), ()), *(str(text).strip() for text in row["captions"]))
            self.found[str(row["id"])] = tuple(dict.fromkeys(text for text in told if text))
        if not self.found:
            raise InputError(f"{path} holds no caption; expected JSON lines with id and captions")

    def of(self, key: str) -> tuple[str, ...]:
        """The written captions of a sample, maybe none."""
        return self.found.get(key, ())
