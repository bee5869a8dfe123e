"""The manifest: what this plugin offers, as strings."""

from __future__ import annotations

from clipgraft.spec import CommandSpec, Component, hookimpl

_PACKAGE = "clipgraft_anomaly"
ANOMALYCLIP = (
    "Zhou et al., AnomalyCLIP: Object-agnostic Prompt Learning for Zero-shot Anomaly Detection, ICLR 2024, "
    "arXiv 2310.18961"
)
GENCLIP = "Reconstruction of GenCLIP, arXiv 2504.14919; no official code or constants were available"
CLIPN = "Wang et al., CLIPN for Zero-Shot OOD Detection: Teaching CLIP to Say No, ICCV 2023, arXiv 2308.12213"

WINCLIP = "Jeong et al., WinCLIP: Zero-/Few-Shot Anomaly Classification and Segmentation, CVPR 2023, arXiv 2303.14814"


@hookimpl
def clipgraft_datasets() -> list[Component]:
    """Data sources, opened as ``name:PATH?split=train&object=NAME``."""
    rows = (
        ("mvtec", "layouts_mvtec:mvtec", "layouts_mvtec:MvtecConfig", "MVTec AD, or anything in its layout"),
        ("parts", "layouts_parts:parts", "layouts_parts:PartsFolderConfig", "Folders normal/, abnormal/ and mask/"),
        ("visa", "layouts_visa:visa", "layouts_visa:VisaConfig", "VisA, as published or converted to folders"),
        ("parts-table", "layouts_table:parts_table", "layouts_table:PartsTableConfig", "CSV, TSV or JSON lines"),
    )
    return [
        Component(name=name, target=f"{_PACKAGE}.{target}", config=f"{_PACKAGE}.{config}", summary=summary)
        for name, target, config, summary in rows
    ]


@hookimpl
def clipgraft_heads() -> list[Component]:
    """Detectors: the component that makes a CLIP one."""
    return [
        Component(
            name="clipn",
            target=f"{_PACKAGE}.clipn.branch:NoBranch",
            config=f"{_PACKAGE}.clipn.branch:ClipnConfig",
            summary="A second text tower that says what a picture does not show; made by the recipe clipn",
            paper=CLIPN,
        ),
        Component(
            name="anomalyclip",
            target=f"{_PACKAGE}.anomalyclip.prompts:AnomalyClip",
            config=f"{_PACKAGE}.anomalyclip.prompts:AnomalyClipConfig",
            summary="Two learnt texts, normal and anomalous, that name no object; made by the recipe anomalyclip",
            paper=ANOMALYCLIP,
        ),
        Component(
            name="genclip",
            target=f"{_PACKAGE}.genclip.prompts:GenClip",
            config=f"{_PACKAGE}.genclip.prompts:GenClipConfig",
            summary="Reconstruction of GenCLIP: general prompts, and ones pictures help to write; made by genclip",
            paper=GENCLIP,
        ),
        Component(
            name="prompts",
            target=f"{_PACKAGE}.handwritten:Prompts",
            config=f"{_PACKAGE}.handwritten:PromptsConfig",
            summary="Hand-written normal and anomalous states of the object's name; the baseline without training",
        ),
        Component(
            name="winclip",
            target=f"{_PACKAGE}.winclip:WinClip",
            config=f"{_PACKAGE}.winclip:WinClipConfig",
            summary="Windows against hand-written prompts, without training; few-shot it is made by the recipe winclip",
            paper=WINCLIP,
        ),
    ]


@hookimpl
def clipgraft_recipes() -> list[Component]:
    """Recipes."""
    return [
        Component(
            name="clipn",
            target=f"{_PACKAGE}.clipn.recipe:ClipnRecipe",
            config=f"{_PACKAGE}.clipn.config:ClipnRunConfig",
            summary="Teach a CLIP to say no: a second text tower that lets it reject what belongs to no known class",
            paper=CLIPN,
            presets=f"{_PACKAGE}.recipes",
        ),
        Component(
            name="anomalyclip",
            target=f"{_PACKAGE}.anomalyclip.recipe:AnomalyClipRecipe",
            config=f"{_PACKAGE}.anomalyclip.config:AnomalyClipRunConfig",
            summary="Learn what damage looks like on some objects, find it on any: two prompts that name no object",
            paper=ANOMALYCLIP,
            presets=f"{_PACKAGE}.recipes",
        ),
        Component(
            name="genclip",
            target=f"{_PACKAGE}.genclip.recipe:GenClipRecipe",
            config=f"{_PACKAGE}.genclip.config:GenClipRunConfig",
            summary="Reconstruction of GenCLIP: learn general prompts, and ones that several layers' features complete",
            paper=GENCLIP,
            presets=f"{_PACKAGE}.recipes",
        ),
        Component(
            name="winclip",
            target=f"{_PACKAGE}.winclip_recipe:WinClipRecipe",
            config=f"{_PACKAGE}.winclip_recipe:WinClipRunConfig",
            summary="Remember a few normal pictures of every part, find what differs from them and reads as damage",
            paper=WINCLIP,
            presets=f"{_PACKAGE}.recipes",
        ),
    ]


@hookimpl
def clipgraft_evaluators() -> list[Component]:
    """Detectors as evaluators."""
    return [
        Component(
            name="clipn-ood",
            target=f"{_PACKAGE}.clipn.unknown_classes:UnknownClasses",
            config=f"{_PACKAGE}.clipn.unknown_classes:UnknownClasses",
            summary="Known against unknown classes: AUROC and FPR95 of CLIPN's rules, MSP, max-logit and energy",
            paper=CLIPN,
        ),
        Component(
            name="inspection",
            target=f"{_PACKAGE}.evaluator:Inspection",
            config=f"{_PACKAGE}.evaluator:Inspection",
            summary="Image AUROC, pixel AUROC and AUPRO of the detector at hand: a run's own, or one without training",
        ),
    ]


@hookimpl
def clipgraft_reports() -> list[Component]:
    """Sections of a run's page."""
    return [
        Component(
            name="heat-maps",
            target=f"{_PACKAGE}.report_heat_maps:heat_maps",
            summary="Where a run's detector is most wrong and most right, with heat maps",
        )
    ]


@hookimpl
def clipgraft_exporters() -> list[Component]:
    """Formats of `clipgraft export`."""
    return [
        Component(
            name="onnx",
            target=f"{_PACKAGE}.onnx_export:export_onnx",
            summary="A detector as an ONNX graph of pictures alone, texts baked in, checked against torch",
        )
    ]


@hookimpl
def clipgraft_commands() -> list[CommandSpec]:
    """`clipgraft anomaly`."""
    return [CommandSpec(name="anomaly", target=f"{_PACKAGE}.commands:app", help="Find defects with a CLIP.")]


@hookimpl
def clipgraft_run_hooks() -> list[Component]:
    """Lifecycle hooks."""
    return [
        Component(
            name="current-head",
            target=f"{_PACKAGE}.current_head:RunsDetector",
            summary="Lets evaluators of a run see the detector that it has made; recipes that make one switch it on",
        )
    ]


@hookimpl
def clipgraft_claims() -> list[Component]:
    """Claims."""
    return [
        Component(
            name="anomalyclip",
            target=f"{_PACKAGE}.anomalyclip.claims:ANOMALYCLIP",
            summary="Prompts learnt on some objects find damage on objects never seen",
            needs=("clipgraft-toyworld",),
            paper=ANOMALYCLIP,
        ),
        Component(
            name="winclip-few-shot",
            target=f"{_PACKAGE}.winclip_claims:FEW_SHOT",
            summary="A few normal pictures find damage that prompts alone, or as much noise, don't",
            needs=("clipgraft-toyworld",),
            paper=WINCLIP,
        ),
        Component(
            name="clipn",
            target=f"{_PACKAGE}.clipn.claims:CLIPN",
            summary="A tower that says no separates unknown classes better than the same CLIP's largest probability",
            needs=("clipgraft-toyworld",),
            paper=CLIPN,
        ),
        Component(
            name="clipn-over-logits",
            target=f"{_PACKAGE}.clipn.claims:OVER_LOGITS",
            summary="The same against the same CLIP's largest cosine, which needs no training",
            needs=("clipgraft-toyworld",),
            paper=CLIPN,
        ),
    ]
