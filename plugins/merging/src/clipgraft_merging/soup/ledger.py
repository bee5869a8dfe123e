"""What a greedy soup has tried: scores, acceptances and rejections in a JSON file, so that a stop loses nothing."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from clipgraft.errors import InputError
from clipgraft.files import write_json

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Step:
    """A candidate: the soup so far with ``model`` (an index of the models) in it, and what became of it."""

    model: int
    score: float
    accepted: bool


@dataclass(slots=True)
class Ledger:
    """``identity`` is what a continued search must share with the one that wrote the file.

    ``alone`` {index: score} and ``steps`` grow as models are judged; ``without`` {index: score of the soup without it}
    is the leave-one-out diagnostic.
    """

    path: Path
    identity: dict[str, Any]
    alone: dict[int, float] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    without: dict[int, float] = field(default_factory=dict)
    stopped_early: bool = False

    def save(self) -> None:
        """Replace the file in one rename."""
        write_json(self.path, {"schema": SCHEMA, **self.identity, **self.told()})

    def told(self) -> dict[str, Any]:
        """What was tried, as plain JSON."""
        return {
            "alone": {str(k): v for k, v in self.alone.items()},
            "order": self.order if len(self.alone) == len(self.identity["models"]) else [],
            "steps": [asdict(step) for step in self.steps],
            "ingredients": self.ingredients,
            "score": self.score,
            "without": {str(k): v for k, v in self.without.items()},
            "stopped_early": self.stopped_early,
        }

    @property
    def order(self) -> list[int]:
        """Models by their score alone, best first; of equal ones the one that was named first."""
        return sorted(self.alone, key=lambda index: (-self.alone[index], index))

    @property
    def ingredients(self) -> list[int]:
        """What is in the soup, in the order of acceptance."""
        return [step.model for step in self.steps if step.accepted]

    @property
    def score(self) -> float | None:
        """Of the soup so far."""
        return next((step.score for step in reversed(self.steps) if step.accepted), None)


def open_ledger(path: Path, identity: dict[str, Any]) -> Ledger:
    """The ledger at ``path``, or a new one; ``InputError`` when it belongs to other models, data or rules."""
    if not path.exists():
        return Ledger(path, identity)
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        schema, theirs = stored["schema"], {key: stored[key] for key in identity}
        found = Ledger(
            path,
            identity,
            {int(k): float(v) for k, v in stored["alone"].items()},
            [Step(**step) for step in stored["steps"]],
            {int(k): float(v) for k, v in stored["without"].items()},
            bool(stored["stopped_early"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is no ledger of a greedy soup; remove it, or choose another --out") from None
    if schema != SCHEMA or theirs != json.loads(json.dumps(identity)):
        other = next((key for key in identity if theirs[key] != json.loads(json.dumps(identity[key]))), "schema")
        raise InputError(f"{path} belongs to a greedy soup with other {other}; remove it, or choose another --out")
    return found
