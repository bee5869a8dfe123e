"""The manifest: what this plugin offers, as strings."""

from __future__ import annotations

from clipgraft.spec import CommandSpec, hookimpl

_PACKAGE = "clipgraft_merging"


@hookimpl
def clipgraft_commands() -> list[CommandSpec]:
    """`clipgraft merging`."""
    return [CommandSpec(name="merging", target=f"{_PACKAGE}.commands:app", help="Merge CLIPs, and graft other models' abilities onto one.")]
