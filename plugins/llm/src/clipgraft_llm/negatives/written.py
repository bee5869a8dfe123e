"""Wrong captions kept in a file: JSON lines of one caption each, made by rule or by anything else.

``{"id": "000123.jpg", "caption": "a red moon and a blue heart", "negatives": ["a blue moon and a red heart"]}``
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from clipgraft import files
from clipgraft.data.base import BadSample, Sample, Source, entry_of
from clipgraft.errors import InputError
from clipgraft.log import RunLog
from clipgraft_llm.negatives.rules import Rule, wrong_captions


class Written:
    """Wrong captions by (sample id, caption); ``sha256`` of the file."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.found: dict[tuple[str, str], tuple[str, ...]] = {}
        try:
            self.sha256 = files.sha256_of(self.path)
            for number, line in enumerate(self.path.read_text("utf-8-sig").splitlines(), 1):
                if line.strip():
                    self._add(json.loads(line), number)
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise InputError(
                f"{path} can't be read ({reason}); write it with clipgraft llm negatives DATA --out FILE"
            ) from None
        except json.JSONDecodeError:
            raise InputError(
                f"{path} line {number} is no JSON; expected {{id, caption, negatives}} in every line"
            ) from None
        if not self.found:
            raise InputError(f"{path} holds no wrong caption; write it with clipgraft llm negatives DATA --out FILE")

    def _add(self, row: object, number: int) -> None:
        keys = ("id", "caption", "negatives")
        if (
            not isinstance(row, Mapping)
            or any(key not in row for key in keys)
            or not isinstance(row["negatives"], list)
        ):
            raise InputError(f"{self.path} line {number}: expected id, caption and a list negatives")
        wrong = tuple(str(text) for text in row["negatives"] if str(text).strip())
        if wrong:
            self.found[str(row["id"]), str(row["caption"])] = wrong

    def __call__(self, sample: Sample, caption: str, rng: random.Random) -> Sequence[str]:
        """Those of the caption, in random order."""
        found = self.found.get((sample.id, caption), ())
        return rng.sample(found, len(found))


def write(source: Source, path: Path, *, rules: Sequence[Rule], most: int, log: RunLog) -> dict[str, int]:
    """Every caption's wrong captions by rule, at most ``most`` each; counts of captions with and without."""
    lines, counts = list[str](), {"captions": 0, "without": 0, "negatives": 0, "unreadable": 0}
    with log.progress("wrong captions", len(source)) as bar:
        for index in range(len(source)):
            bar.advance()
            try:
                entry = entry_of(source, index)
            except BadSample:
                counts["unreadable"] += 1
                continue
            for caption in entry.captions:
                options = wrong_captions(caption, rules)
                found = random.Random(f"{entry.id}/{caption}").sample(options, min(most, len(options)))
                counts["captions"] += 1
                counts["without"] += not found
                counts["negatives"] += len(found)
                row = {"id": entry.id, "caption": caption, "negatives": found}
                lines += [json.dumps(row, ensure_ascii=False)] if found else []
    if not counts["captions"]:
        raise InputError(f"{source.name} has no captions; give a csv: with a caption column")
    if not lines:
        raise InputError(
            f"the rules {', '.join(rules)} make no wrong caption of {source.name}'s {counts['captions']}; add rules"
        )
    files.write_text(path, "\n".join(lines) + "\n")
    return counts
