"""The manifest: what this plugin offers, as strings."""

from __future__ import annotations

from clipgraft.spec import CommandSpec, Component, hookimpl

_PACKAGE = "clipgraft_merging"
SAM_CLIP = (
    "Wang et al., SAM-CLIP: Merging Vision Foundation Models towards Semantic and Spatial Understanding, CVPRW 2024, "
    "arXiv 2310.15308"
)

MOF = "Tong et al., Eyes Wide Shut? Exploring the Visual Shortcomings of Multimodal LLMs, CVPR 2024, arXiv 2401.06209"
COMM = "Jiang et al., From CLIP to DINO: Visual Encoders Shout in Multi-modal Large Language Models, arXiv 2310.08825"
EWA = "Huang et al., Experts Weights Averaging: A New General Training Scheme for Vision Transformers, arXiv 2308.06093"
CLIP_MOE = (
    "Zhang et al., CLIP-MoE: Towards Building Mixture of Experts for CLIP with Diversified Multiplet Upcycling, "
    "EMNLP 2025, arXiv 2409.19291"
)

SOUPS = "Wortsman et al., Model soups, ICML 2022, arXiv 2203.05482"
WISE_FT = "Wortsman et al., Robust fine-tuning of zero-shot models, CVPR 2022, arXiv 2109.01903"
OPCM = "Tang et al., Merging Models on the Fly Without Retraining, NeurIPS 2025, arXiv 2501.09522"


AGGLOMERATE = (
    "Ranzinger et al., AM-RADIO: Agglomerative Vision Foundation Model, CVPR 2024, arXiv 2312.06709; PHI-S: "
    "Distribution Balancing for Label-Free Multi-Teacher Distillation, arXiv 2410.01680"
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
            name="two-towers",
            target=f"{_PACKAGE}.fusion.two_towers:TwoTowers",
            config=f"{_PACKAGE}.fusion.two_towers:TwoTowers",
            summary="Patch tokens of CLIP and of a second, frozen tower; embeddings stay CLIP's",
            paper=MOF,
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
            name="fusion",
            target=f"{_PACKAGE}.fusion.head:Fusion",
            config=f"{_PACKAGE}.fusion.head:FusionConfig",
            summary="Tokens or levels of two towers as one sequence, trainable",
            paper=COMM,
        ),
        Component(
            name="adaptors",
            target=f"{_PACKAGE}.agglomerate.adaptors:Adaptors",
            config=f"{_PACKAGE}.agglomerate.adaptors:AdaptorsConfig",
            summary="What a student of several teachers says in the words of each; made by the recipe agglomerate",
            paper=AGGLOMERATE,
        ),
        Component(
            name="sam-masks",
            target=f"{_PACKAGE}.sam.segmenter:sam_masks",
            config=f"{_PACKAGE}.sam.segmenter:SamMasksConfig",
            summary="Masks from points, boxes and masks: a SAM, or the promptable half of a run of sam-clip",
            needs=("transformers>=4.56",),
        ),
    ]


@hookimpl
def clipgraft_datasets() -> list[Component]:
    """Data sources."""
    return [
        Component(
            name="segmentation",
            target=f"{_PACKAGE}.segmentation.folder:SegmentationFolder",
            config=f"{_PACKAGE}.segmentation.folder:SegmentationFolderConfig",
            summary="Pictures with index masks: folders images/ and masks/, or the layout of PASCAL VOC",
        )
    ]


@hookimpl
def clipgraft_evaluators() -> list[Component]:
    """Masks and labels of pixels, measured."""
    rows = (
        ("zero-shot-seg", "zero_shot:ZeroShotSegmentation", "Pixels named by words: patches against texts, mIoU"),
        ("prompted-masks", "prompted:PromptedMasks", "Masks from points or boxes, against truth and against a SAM"),
        (
            "masked-zero-shot-seg",
            "pipeline:MaskedZeroShotSegmentation",
            "Two models in a row: masks of a SAM, named by a CLIP; mIoU",
        ),
    )
    return [
        Component(
            name=name,
            target=f"{_PACKAGE}.segmentation.{where}",
            config=f"{_PACKAGE}.segmentation.{where}",
            summary=summary,
            needs=("transformers>=4.56",),
        )
        for name, where, summary in rows
    ] + [
        Component(
            name="ingredients",
            target=f"{_PACKAGE}.recipes_merge.evaluators:Ingredients",
            config=f"{_PACKAGE}.recipes_merge.evaluators:Ingredients",
            summary="Zero-shot top1 of a soup beside that of its ingredients, in a run of the recipe soup",
            paper=SOUPS,
        ),
        Component(
            name="continual",
            target=f"{_PACKAGE}.recipes_merge.evaluators:Continual",
            config=f"{_PACKAGE}.recipes_merge.evaluators:Continual",
            summary="Accuracy over tasks and what was forgotten, in a run of the recipe opcm",
            paper=OPCM,
        ),
        Component(
            name="word-segments",
            target=f"{_PACKAGE}.samclip.evaluators:WordSegments",
            config=f"{_PACKAGE}.samclip.evaluators:WordSegments",
            summary="Zero-shot segmentation by patches, refined, or by two models, under one name",
            needs=("transformers>=4.56",),
            paper=SAM_CLIP,
        ),
        Component(
            name="kept-masks",
            target=f"{_PACKAGE}.samclip.evaluators:KeptMasks",
            config=f"{_PACKAGE}.samclip.evaluators:KeptMasks",
            summary="Prompted masks of the model, or of its teacher while it has none",
            needs=("transformers>=4.56",),
            paper=SAM_CLIP,
        ),
    ]


@hookimpl
def clipgraft_recipes() -> list[Component]:
    """Recipes."""
    return [
        Component(
            name="agglomerate",
            target=f"{_PACKAGE}.agglomerate.recipe:AgglomerateRecipe",
            config=f"{_PACKAGE}.agglomerate.config:AgglomerateConfig",
            summary="One image tower learns from several teachers at once: CLIPs, a SAM, DINOv2, RADIO",
            needs=("transformers>=4.56",),
            paper=AGGLOMERATE,
            presets=f"{_PACKAGE}.recipes",
        ),
        Component(
            name="soup",
            target=f"{_PACKAGE}.recipes_merge.soup:SoupRecipe",
            config=f"{_PACKAGE}.recipes_merge.config:SoupRunConfig",
            summary="Fine-tunes of one base with other settings each, and the mean of all or of those that help",
            paper=SOUPS,
            presets=f"{_PACKAGE}.recipes",
        ),
        Component(
            name="wise-ft",
            target=f"{_PACKAGE}.recipes_merge.wise_ft:WiseFtRecipe",
            config=f"{_PACKAGE}.recipes_merge.config:WiseFtRunConfig",
            summary="Fine-tune, then go back towards the base by a share that held-out data choose",
            paper=WISE_FT,
            presets=f"{_PACKAGE}.recipes",
        ),
        Component(
            name="opcm",
            target=f"{_PACKAGE}.recipes_merge.continual:OpcmRecipe",
            config=f"{_PACKAGE}.recipes_merge.config:OpcmRunConfig",
            summary="Fine-tune on each of several tasks, merge the models one after another, measure what is forgotten",
            paper=OPCM,
            presets=f"{_PACKAGE}.recipes",
        ),
        Component(
            name="clip-moe",
            target=f"{_PACKAGE}.moe.recipe:ClipMoe",
            config=f"{_PACKAGE}.moe.config:ClipMoeConfig",
            summary="Feed-forward networks trained inside clusters of the data become experts under trained gates",
            paper=CLIP_MOE,
            presets=f"{_PACKAGE}.recipes",
        ),
        Component(
            name="ewa",
            target=f"{_PACKAGE}.ewa.recipe:Ewa",
            config=f"{_PACKAGE}.ewa.recipe:EwaConfig",
            summary="Fine-tuning with averaged copies of feed-forward networks; the export is a plain CLIP",
            paper=EWA,
            presets=f"{_PACKAGE}.recipes",
        ),
        Component(
            name="sam-clip",
            target=f"{_PACKAGE}.samclip.recipe:SamClipRecipe",
            config=f"{_PACKAGE}.samclip.config:SamClipConfig",
            summary="One image tower with SAM's promptable masks and CLIP's meaning, from a SAM and a CLIP",
            needs=("transformers>=4.56",),
            paper=SAM_CLIP,
            presets=f"{_PACKAGE}.recipes",
        ),
    ]


@hookimpl
def clipgraft_reports() -> list[Component]:
    """Sections of a run's page."""
    return [
        Component(
            name="segmentations",
            target=f"{_PACKAGE}.segmentation.report_section:segmentations",
            summary="Pictures labelled by words before and after the run, beside the truth",
            needs=("transformers>=4.56",),
        ),
        Component(
            name="merge-numbers",
            target=f"{_PACKAGE}.path.report_section:merge_numbers",
            summary="The path between two models and accuracy after every merge, as tables",
        ),
    ]


@hookimpl
def clipgraft_claims() -> list[Component]:
    """Claims."""
    return [
        Component(
            name="sam-clip",
            target=f"{_PACKAGE}.samclip.claims:SAM_CLIP",
            summary="A SAM's tower learns a CLIP's words and keeps its promptable masks",
            needs=("clipgraft-toyworld", "transformers>=4.56"),
            paper=SAM_CLIP,
        ),
        Component(
            name="sam-clip-segments",
            target=f"{_PACKAGE}.samclip.claims:SEGMENTS",
            summary="Its patches segment by words better than the CLIP's, and than SAM and CLIP in a row",
            needs=("clipgraft-toyworld", "transformers>=4.56"),
            paper=SAM_CLIP,
        ),
        Component(
            name="soup",
            target=f"{_PACKAGE}.recipes_merge.claims:SOUP",
            summary="A soup of four fine-tunes is better than they are on average and than the chosen one",
            needs=("clipgraft-toyworld",),
            paper=SOUPS,
        ),
        Component(
            name="wise-ft",
            target=f"{_PACKAGE}.recipes_merge.claims:WISE",
            summary="Between base and fine-tune lies a model that is better under a shift than both",
            needs=("clipgraft-toyworld",),
            paper=WISE_FT,
        ),
        Component(
            name="wise-ft-over-gentle",
            target=f"{_PACKAGE}.recipes_merge.claims:OVER_GENTLE",
            summary="The same point against a fine-tune at a quarter of the learning rate",
            needs=("clipgraft-toyworld",),
            paper=WISE_FT,
        ),
        Component(
            name="opcm",
            target=f"{_PACKAGE}.recipes_merge.claims:OPCM",
            summary="Five models merged one after another: more is kept than by task arithmetic or averaging",
            needs=("clipgraft-toyworld",),
            paper=OPCM,
        ),
        Component(
            name="opcm-backward",
            target=f"{_PACKAGE}.recipes_merge.claims:BACKWARD",
            summary="Backward transfer of OPCM against continual task arithmetic",
            needs=("clipgraft-toyworld",),
            paper=OPCM,
        ),
        Component(
            name="clip-moe",
            target=f"{_PACKAGE}.moe.claims:CLIP_MOE",
            summary="Detailed captions are retrieved better than after dense fine-tuning, and zero-shot is kept",
            needs=("clipgraft-toyworld",),
            paper=CLIP_MOE,
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
