"""The manifest: what this plugin offers, as strings."""

from __future__ import annotations

from clipgraft.spec import CommandSpec, hookimpl

_PACKAGE = "clipgraft_llm"


@hookimpl
def clipgraft_commands() -> list[CommandSpec]:
    """`clipgraft llm`."""
    return [CommandSpec(name="llm", target=f"{_PACKAGE}.commands:app", help="Other text towers, longer texts, sharper words.")]
