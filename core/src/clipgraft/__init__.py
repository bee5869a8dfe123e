"""clipgraft: post-train, adapt, merge, evaluate and ship CLIP. Names load on first use, so importing is cheap."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "ClipgraftError": "clipgraft.errors",
    "InputError": "clipgraft.errors",
    "Component": "clipgraft.spec",
    "CommandSpec": "clipgraft.spec",
    "hookimpl": "clipgraft.spec",
    "runhook": "clipgraft.spec",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("clipgraft")
    if name not in _EXPORTS:
        raise AttributeError(f"module 'clipgraft' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
