"""The manifest of ``embedding``."""

from __future__ import annotations

from clipgraft.spec import CommandSpec, hookimpl

PACKAGE = "clipgraft_embedding"


@hookimpl
def clipgraft_commands() -> list[CommandSpec]:
    """Commands that the core leaves to this plugin."""
    table = {
        "embed": ("embed_command:embed", "Write the embeddings of images or captions to one file."),
        "search": ("search_command:search", "Find the images of an embedding file that fit a text or an image."),
        "classify": ("classify_command:classify", "Sort images into classes that are given as words."),
    }
    return [CommandSpec(name=name, target=f"{PACKAGE}.{target}", help=text) for name, (target, text) in table.items()]
