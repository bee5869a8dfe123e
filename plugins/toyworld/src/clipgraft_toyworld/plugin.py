"""The manifest: data sources, tiny CLIPs and frozen helpers, as strings."""

from __future__ import annotations

from clipgraft.spec import CommandSpec, Component, hookimpl

_PACKAGE = "clipgraft_toyworld"


@hookimpl
def clipgraft_datasets() -> list[Component]:
    """Data sources."""
    rows = (
        ("images", "sources:Images", "Procedural scenes with short, long, detailed or reworded captions and masks"),
        ("pairs", "sources:MinimalPairs", "Minimal pairs of nine patterns after MMVP"),
        ("defects", "task_sources:Defects", "Inspection pictures with damage masks"),
        ("videos", "task_sources:Videos", "Short videos whose class no single frame tells"),
        ("crowds", "task_sources:Crowds", "Two different objects per picture with instance and semantic masks"),
    )
    world = [
        Component(name=name, target=f"{_PACKAGE}.{where}", config=f"{_PACKAGE}.{where}Config", summary=summary)
        for name, where, summary in rows
    ]
    real = [
        Component(
            name="digits",
            target=f"{_PACKAGE}.digits:Digits",
            config=f"{_PACKAGE}.digits:DigitsConfig",
            summary="1,797 real handwritten digits from scikit-learn",
            needs=("scikit-learn>=1.3",),
        ),
        Component(
            name="photos",
            target=f"{_PACKAGE}.photos:Photos",
            config=f"{_PACKAGE}.photos:PhotosConfig",
            summary="About twenty real photographs from scikit-image and scikit-learn",
            needs=("scikit-image>=0.22", "scikit-learn>=1.3"),
        ),
    ]
    return world + real


@hookimpl
def clipgraft_encoders() -> list[Component]:
    """Tiny CLIPs that live in the world."""
    rows = (
        ("clip", "clip", "A tiny CLIP that knows classes and is blind to detail; seed 0"),
        ("clip-1", "clip_1", "The same recipe, seed 1"),
        ("clip-2", "clip_2", "The same recipe, seed 2"),
        ("teacher", "teacher", "Base 0's text tower with a detail-aware image tower: the ceiling"),
    )
    return [Component(name=name, target=f"{_PACKAGE}.models:{attr}", summary=summary) for name, attr, summary in rows]


@hookimpl
def clipgraft_heads() -> list[Component]:
    """Frozen helpers as modules."""
    rows = (
        ("generator", "generator", "Restores the teacher's patch tokens from a text embedding", ("diffusers>=0.36",)),
        ("generator-own", "generator_own", "The same over base 0's own patch tokens", ("diffusers>=0.36",)),
        ("mask-teacher", "mask_teacher", "Outlines objects of any kind", ()),
        ("sam-teacher", "sam_teacher", "A tiny promptable SAM: outlines the object that a point or a box means", ()),
        ("text-teacher", "text_teacher", "A text model that knows words no image caption contains", ()),
    )
    return [
        Component(name=name, target=f"{_PACKAGE}.models:{attr}", summary=summary, needs=needs)
        for name, attr, summary, needs in rows
    ]


@hookimpl
def clipgraft_suites() -> list[Component]:
    """What training should not cost."""
    return [
        Component(
            name="retention",
            target=f"{_PACKAGE}.suites:retention",
            summary="Zero-shot, retrieval, kNN, clusters: of the toy world for its models, of real images for others",
        )
    ]


@hookimpl
def clipgraft_commands() -> list[CommandSpec]:
    """`clipgraft toyworld`."""
    return [
        CommandSpec(
            name="toyworld",
            target=f"{_PACKAGE}.commands:app",
            help="Look at the toy world, rebuild its models, see what its generators notice.",
        )
    ]
