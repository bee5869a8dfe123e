"""The manifest: what this plugin offers, as strings."""

from __future__ import annotations

from clipgraft.spec import Component, hookimpl

_PACKAGE = "clipgraft_anomaly"


@hookimpl
def clipgraft_datasets() -> list[Component]:
    """Data sources."""
    return []


@hookimpl
def clipgraft_heads() -> list[Component]:
    """Detectors: the component that makes a CLIP one."""
    return []


@hookimpl
def clipgraft_recipes() -> list[Component]:
    """Recipes."""
    return []
