"""Suites: which evaluators on which data, by one name; registered, where they may suit the model, or in a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from clipgraft.config.schema import EvaluatorNode, EvaluatorRef
from clipgraft.errors import InputError

if TYPE_CHECKING:
    from clipgraft.encoders.base import Encoder
    from clipgraft.registry import Registry


def is_file(suite: str) -> bool:
    """Whether ``suite`` is a YAML file rather than a registered name."""
    return suite.endswith((".yaml", ".yml"))


def check_suite(suite: str, *, registry: Registry) -> None:
    """Raise unless ``suite`` is a readable FILE.yaml, or a registered suite whose needs are installed."""
    if is_file(suite):
        read_file(Path(suite))
    else:
        registry.ready("suite", suite)


def open_suite(suite: str, encoder: Encoder, *, registry: Registry) -> list[EvaluatorNode]:
    """What the suite measures on ``encoder``; may be empty when it has nothing for it."""
    if is_file(suite):
        return read_file(Path(suite))
    found: Sequence[str] = registry.build("suite", suite, {})(encoder)
    return _nodes(list(found), origin=f"suite {suite}")


def read_file(path: Path) -> list[EvaluatorNode]:
    """A YAML list of names ("NAME" or "NAME@SRC") and ``{use, data, ...}`` nodes."""
    from clipgraft.config.load import parse_yaml

    try:
        listed = parse_yaml(path.read_text("utf-8"), origin=path.name)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"can't read {path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from error
    if not isinstance(listed, list) or not listed:
        raise InputError(f"{path}: expected a list of evaluators, such as '- zero-shot@folder:DIR'")
    return _nodes(listed, origin=str(path))


def _nodes(listed: list[Any], *, origin: str) -> list[EvaluatorNode]:
    try:
        return TypeAdapter(list[EvaluatorRef]).validate_python(listed)
    except ValidationError as error:
        place = error.errors(include_url=False)[0]
        entry = listed[int(place["loc"][0])] if place["loc"] else listed
        raise InputError(
            f"{origin}: {entry!r:.80} is no evaluator; write NAME@SRC or {{use: NAME, data: SRC}}"
        ) from error
