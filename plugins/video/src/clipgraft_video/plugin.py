"""The manifest: what this plugin offers, as strings."""

from __future__ import annotations

from clipgraft.spec import CommandSpec, Component, hookimpl

_PACKAGE = "clipgraft_video"
VIFI = "Rasheed et al., Fine-tuned CLIP Models are Efficient Video Learners, CVPR 2023, arXiv 2212.03640"


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


@hookimpl
def clipgraft_heads() -> list[Component]:
    """Heads over frames."""
    return [
        Component(
            name="mean",
            target=f"{_PACKAGE}.heads:mean",
            config=f"{_PACKAGE}.heads:MeanConfig",
            summary="The mean over frames, in one of three ways",
            paper=VIFI,
        )
    ]


@hookimpl
def clipgraft_recipes() -> list[Component]:
    """Recipes."""
    return [
        Component(
            name="vifi-clip",
            target=f"{_PACKAGE}.vifi.recipe:ViFiClip",
            config=f"{_PACKAGE}.vifi.recipe:VifiConfig",
            summary="Fine-tune a CLIP on videos, whose embedding is the mean over frames",
            paper=VIFI,
            presets=f"{_PACKAGE}.recipes",
        )
    ]


@hookimpl
def clipgraft_evaluators() -> list[Component]:
    """Evaluators."""
    return [
        Component(name=name, target=target, config=target, summary=summary)
        for name, attribute, summary in (
            ("classification", "Classification", "Videos by the texts of their classes, with several views"),
            ("retrieval", "VideoRetrieval", "Captions by videos and videos by captions"),
        )
        for target in [f"{_PACKAGE}.evaluator:{attribute}"]
    ]


@hookimpl
def clipgraft_commands() -> list[CommandSpec]:
    """`clipgraft video`."""
    return [CommandSpec(name="video", target=f"{_PACKAGE}.commands:app", help="Videos with a CLIP.")]
