"""Suites: which evaluators on which data, by one name; registered, where they may suit the model, or in a file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from clipgraft.config.schema import EvaluatorNode, EvaluatorRef, evaluator_named
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
    """What the suite measures on ``encoder``; may be empty when it has nothing for it.

    A registered suite may list evaluators of plugins that aren't in use, by their full names: these are left out.
    """
    if is_file(suite):
        return read_file(Path(suite))
    found: Sequence[str] = registry.build("suite", suite, {})(encoder)
    used = {info.name for info in registry.plugins if info.status == "ok"}
    nodes = _nodes(list(found), origin=f"suite {suite}")
    return [node for node in nodes if "/" not in node.use or node.use.partition("/")[0] in used]


def check_requested(on: Sequence[str], suite: str | None, *, registry: Registry) -> None:
    """Raise before any model is opened when ``--on`` and ``--suite`` ask for nothing, or for what isn't there."""
    if suite is not None:
        check_suite(suite, registry=registry)
    elif not _names(on):
        raise InputError("name what to measure: --on NAME@SRC (clipgraft list evaluators) or --suite NAME")
    for name in _names(on):
        registry.ready("evaluator", evaluator_named(name).use)


def requested(on: Sequence[str], suite: str | None, encoder: Encoder, *, registry: Registry) -> list[EvaluatorNode]:
    """What a command line asks for: ``--on NAME,NAME --on NAME``, then what the suite has for this encoder."""
    names = _names(on)
    listed = [] if suite is None else open_suite(suite, encoder, registry=registry)
    if suite is not None and not listed and not names:
        raise InputError(
            f"suite {suite} has nothing to measure on {encoder.data.origin.uri}; name evaluators with --on"
        )
    return [*map(evaluator_named, names), *listed]


def _names(on: Sequence[str]) -> list[str]:
    """Names between commas that aren't inside brackets."""
    return [name.strip() for text in on for name in re.split(r",(?![^\[]*\])", text) if name.strip()]


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
