"""The manifest: what this plugin offers, as strings."""

from __future__ import annotations

from clipgraft.spec import CommandSpec, Component, hookimpl

_PACKAGE = "clipgraft_merging"
SAM_CLIP = (
    "Wang et al., SAM-CLIP: Merging Vision Foundation Models towards Semantic and Spatial Understanding, CVPRW 2024, "
    "arXiv 2310.15308"
)

CLIP_MOE = (
    "Zhang et al., CLIP-MoE: Towards Building Mixture of Experts for CLIP with Diversified Multiplet Upcycling, "
    "EMNLP 2025, arXiv 2409.19291"
)


@hookimpl
def clipgraft_grafts() -> list[Component]:
    """Structural changes of a CLIP."""
    return [
        Component(
            name="moe",
            target=f"{_PACKAGE}.moe.graft:MoE",
            config=f"{_PACKAGE}.moe.graft:MoE",
            summary="Feed-forward networks become mixtures of experts that begin as copies",
            paper=CLIP_MOE,
        ),
        Component(
            name="sam-image",
            target=f"{_PACKAGE}.samclip.image:SamImageGraft",
            config=f"{_PACKAGE}.samclip.image:SamImageGraft",
            summary="The image tower becomes a SAM with a CLIP head; sam-clip fills and trains it",
            needs=("transformers>=4.56",),
            paper=SAM_CLIP,
        ),
        Component(
            name="sam-resolution",
            target=f"{_PACKAGE}.samclip.image:SamResolution",
            config=f"{_PACKAGE}.samclip.image:SamResolution",
            summary="Another image size for a CLIP on SAM's tower",
        ),
    ]


@hookimpl
def clipgraft_heads() -> list[Component]:
    """Parts that work beside a CLIP."""
    return [
        Component(
            name="sam-masks",
            target=f"{_PACKAGE}.sam.segmenter:sam_masks",
            config=f"{_PACKAGE}.sam.segmenter:SamMasksConfig",
            summary="Masks from points, boxes and masks: a SAM, or the promptable half of a run of sam-clip",
            needs=("transformers>=4.56",),
        ),
    ]


@hookimpl
def clipgraft_recipes() -> list[Component]:
    """Recipes."""
    return [
        Component(
            name="clip-moe",
            target=f"{_PACKAGE}.moe.recipe:ClipMoe",
            config=f"{_PACKAGE}.moe.config:ClipMoeConfig",
            summary="Feed-forward networks trained inside clusters of the data become experts under trained gates",
            paper=CLIP_MOE,
            presets=f"{_PACKAGE}.recipes",
        ),
    ]


@hookimpl
def clipgraft_commands() -> list[CommandSpec]:
    """`clipgraft merging`."""
    return [
        CommandSpec(
            name="merging",
            target=f"{_PACKAGE}.commands:app",
            help="Merge CLIPs, and graft other models' abilities onto one.",
        )
    ]
