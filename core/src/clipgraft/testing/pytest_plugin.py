"""The part of the conformance suite that every pytest loads: one option, nothing imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--clipgraft-plugin``."""
    group = parser.getgroup("clipgraft", "conformance of clipgraft plugins")
    group.addoption(
        "--clipgraft-plugin",
        action="append",
        metavar="NAME|FILE.py",
        help="Check this plugin with: pytest --pyargs clipgraft.testing.conformance; repeatable.",
    )
