"""The manifest of ``embedding``."""

from __future__ import annotations

from typing import Any

from clipgraft.spec import CommandSpec, Component, hookimpl

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


@hookimpl
def clipgraft_exporters() -> list[Component]:
    """Formats of `clipgraft export`."""
    return [
        Component(
            name="onnx-towers",
            target=f"{PACKAGE}.onnx_towers:export_towers",
            summary="Both towers of any CLIP as ONNX graphs, checked against torch",
            needs=("onnx>=1.16", "onnxruntime>=1.18", "onnxscript>=0.2"),
        )
    ]


@hookimpl
def clipgraft_open(uri: str) -> Any:
    """A folder of the exporter `onnx-towers`, as a model that can be measured."""
    from clipgraft_embedding.onnx_encoder import open_towers

    return open_towers(uri)
