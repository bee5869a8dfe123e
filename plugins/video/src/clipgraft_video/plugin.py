"""The manifest: what this plugin offers, as strings."""

from __future__ import annotations

from clipgraft.spec import Component, hookimpl

_PACKAGE = "clipgraft_video"


@hookimpl
def clipgraft_datasets() -> list[Component]:
    """Data sources, opened as ``name:PATH?frames=8&size=224``."""
    return [
        Component(
            name="video",
            target=f"{_PACKAGE}.sources:videos",
            config=f"{_PACKAGE}.sources:VideosConfig",
            summary="Video files: a folder with one sub-folder per class, a flat one, or a list file of any known form",
        ),
        Component(
            name="msrvtt",
            target=f"{_PACKAGE}.msrvtt:msrvtt",
            config=f"{_PACKAGE}.msrvtt:MsrvttConfig",
            summary="MSR-VTT: MSRVTT_data.json with the splits 9k, 7k and JSFUSION's 1k-A",
        ),
    ]
