"""The manifest: what this plugin offers, as strings."""

from __future__ import annotations

from clipgraft.spec import CommandSpec, Component, hookimpl

_PACKAGE = "clipgraft_llm"
LONGCLIP = "Zhang et al., Long-CLIP: Unlocking the Long-Text Capability of CLIP, ECCV 2024, arXiv 2403.15378"
LACLIP = "Fan et al., Improving CLIP Training with Language Rewrites, NeurIPS 2023, arXiv 2305.20088"
LLM2CLIP = "Huang et al., LLM2CLIP: Powerful Language Model Unlocks Richer Visual Representation, arXiv 2411.04997"
NEGCLIP = (
    "Yuksekgonul et al., When and Why Vision-Language Models Behave like Bags-Of-Words, ICLR 2023, arXiv 2210.01936"
)
COUNT = "Paiss et al., Teaching CLIP to Count to Ten, ICCV 2023, arXiv 2302.12066"
REFINE = (
    "Yamaguchi et al., Post-pre-training for Modality Alignment in Vision-Language Foundation Models, CVPR 2025, "
    "arXiv 2504.12717"
)
TINYCLIP = (
    "Wu et al., TinyCLIP: CLIP Distillation via Affinity Mimicking and Weight Inheritance, ICCV 2023, arXiv 2309.12314"
)
REINFORCED = (
    "Vasu et al., MobileCLIP: Fast Image-Text Models through Multi-Modal Reinforced Training, CVPR 2024, "
    "arXiv 2311.17049"
)


@hookimpl
def clipgraft_datasets() -> list[Component]:
    """Data with long captions, and captions from elsewhere."""
    rows = (
        (
            "urban1k",
            "long_retrieval.layouts:urban1k",
            "long_retrieval.layouts:UrbanConfig",
            "Urban1k: image/ and caption/",
        ),
        (
            "docci",
            "long_retrieval.layouts:docci",
            "long_retrieval.layouts:DocciConfig",
            "DOCCI's descriptions by split",
        ),
        (
            "sharegpt4v",
            "long_retrieval.layouts:sharegpt4v",
            "long_retrieval.layouts:ShareConfig",
            "ShareGPT4V's conversations: the first 1000 records are validation",
        ),
        (
            "captions",
            "captions.source:captions",
            "captions.source:CaptionsConfig",
            "Rewritten captions beside a source's own, each version with its share",
        ),
    )
    return [
        Component(
            name=name,
            target=f"{_PACKAGE}.{target}",
            config=f"{_PACKAGE}.{config}",
            summary=summary,
            paper=LACLIP if name == "captions" else "",
        )
        for name, target, config, summary in rows
    ]


@hookimpl
def clipgraft_evaluators() -> list[Component]:
    """Evaluators, each its own config."""
    rows = (
        (
            "long-retrieval",
            "retrieval:LongRetrieval",
            "Image-text recall, and how much of the captions was cut",
            LONGCLIP,
        ),
        (
            "caption-retrieval",
            "caption_retrieval:CaptionRetrieval",
            "The text tower alone: the other caption of the same image",
            LLM2CLIP,
        ),
    )
    return [
        Component(name=name, target=target, config=target, summary=summary, paper=paper)
        for name, attribute, summary, paper in rows
        for target in [f"{_PACKAGE}.long_retrieval.{attribute}"]
    ]


@hookimpl
def clipgraft_losses() -> list[Component]:
    """Losses by name."""
    rows = (
        (
            "affinity",
            "tiny.affinity:Affinity",
            "TinyCLIP: the student's image-text softmax against a teacher's",
            TINYCLIP,
        ),
        ("hycd", "refine.objective:Hycd", "CLIP-Refine: self-distillation, half of it from right pairs", REFINE),
        ("rafa", "refine.objective:Rafa", "CLIP-Refine: image and text of a pair towards one random vector", REFINE),
        ("count", "counting.objective:Count", "A caption against itself with another number", COUNT),
        (
            "reinforced",
            "reinforce.objective:Reinforced",
            "MobileCLIP: stored teachers, each with its temperature, beside CLIP's own loss",
            REINFORCED,
        ),
    )
    return [
        Component(
            name=name,
            target=f"{_PACKAGE}.{target}Loss",
            config=f"{_PACKAGE}.{target}Config",
            summary=summary,
            paper=paper,
        )
        for name, target, summary, paper in rows
    ] + [
        Component(
            name="negclip",
            target=f"{_PACKAGE}.negatives.objective:NegClipLoss",
            summary="CLIP's loss with wrong captions as further columns of the image-to-text half",
            paper=NEGCLIP,
        ),
        Component(
            name="pcm",
            target=f"{_PACKAGE}.longclip.components:Pcm",
            config=f"{_PACKAGE}.longclip.config:PcmLossConfig",
            summary="Long-CLIP: images reduced to their primary components against short captions",
            paper=LONGCLIP,
        ),
    ]


@hookimpl
def clipgraft_grafts() -> list[Component]:
    """Structural changes."""
    return [
        Component(
            name="stretch-positions",
            target=f"{_PACKAGE}.longclip.graft:StretchPositions",
            config=f"{_PACKAGE}.longclip.graft:StretchPositions",
            summary="Longer texts: positions are stretched, the first ones kept and frozen; plain weights at export",
            paper=LONGCLIP,
        ),
        Component(
            name="transformer-text",
            target=f"{_PACKAGE}.tower.graft:TransformerText",
            config=f"{_PACKAGE}.tower.graft:TransformerText",
            summary="A language or sentence-embedding model of transformers as the text tower, with a projection",
            paper=LLM2CLIP,
        ),
        Component(
            name="inherit",
            target=f"{_PACKAGE}.tiny.inheritance:Inherit",
            config=f"{_PACKAGE}.tiny.inheritance:Inherit",
            summary="A smaller CLIP that takes over layers, channels, heads and hidden units of the model",
            paper=TINYCLIP,
        ),
    ]


@hookimpl
def clipgraft_recipes() -> list[Component]:
    """Recipes."""
    return [
        Component(
            name="llm2clip",
            target=f"{_PACKAGE}.llm2clip.recipe:Llm2Clip",
            config=f"{_PACKAGE}.llm2clip.config:Llm2ClipConfig",
            summary="A frozen language model as the text tower: the image tower and a projection learn its space",
            paper=LLM2CLIP,
            presets=f"{_PACKAGE}.recipes",
        ),
        Component(
            name="caption-contrast",
            target=f"{_PACKAGE}.llm2clip.caption_recipe:CaptionContrast",
            config=f"{_PACKAGE}.llm2clip.config:CaptionContrastConfig",
            summary="A language model learns that captions of one picture mean the same; LLM2CLIP's first stage",
            paper=LLM2CLIP,
            presets=f"{_PACKAGE}.recipes",
        ),
        Component(
            name="long-clip",
            target=f"{_PACKAGE}.longclip.recipe:LongClipRecipe",
            config=f"{_PACKAGE}.longclip.config:LongClipConfig",
            summary="Long and short captions together: a CLIP that reads on without forgetting the short ones",
            paper=LONGCLIP,
            presets=f"{_PACKAGE}.recipes",
        ),
        Component(
            name="tinyclip",
            target=f"{_PACKAGE}.tiny.recipe:TinyClip",
            config=f"{_PACKAGE}.tiny.config:TinyClipConfig",
            summary="A smaller CLIP from the weights of the model, taught by the model's image-text affinities",
            paper=TINYCLIP,
            presets=f"{_PACKAGE}.recipes",
        ),
        Component(
            name="negclip",
            target=f"{_PACKAGE}.negatives.recipe:NegClip",
            config=f"{_PACKAGE}.negatives.config:NegClipConfig",
            summary="Captions that are wrong in a word or its place teach a CLIP to mind both",
            paper=NEGCLIP,
            presets=f"{_PACKAGE}.recipes",
        ),
        Component(
            name="count-to-ten",
            target=f"{_PACKAGE}.counting.recipe:CountToTen",
            config=f"{_PACKAGE}.counting.config:CountRunConfig",
            summary="Captions with a number against the same with another one: a CLIP that minds how many",
            paper=COUNT,
            presets=f"{_PACKAGE}.recipes",
        ),
        Component(
            name="reinforce",
            target=f"{_PACKAGE}.reinforce.recipe:Reinforce",
            config=f"{_PACKAGE}.reinforce.config:ReinforceConfig",
            summary="Learn from several teachers that were asked once, crop by crop (clipgraft llm reinforce-data)",
            paper=REINFORCED,
            presets=f"{_PACKAGE}.recipes",
        ),
        Component(
            name="clip-refine",
            target=f"{_PACKAGE}.refine.recipe:ClipRefine",
            config=f"{_PACKAGE}.refine.config:RefineConfig",
            summary="A short training after pre-training that closes the gap between images and texts",
            paper=REFINE,
            presets=f"{_PACKAGE}.recipes",
        ),
    ]


@hookimpl
def clipgraft_open(uri: str) -> object:
    """``llm:DIR``: a text model alone."""
    if not uri.startswith("llm:"):
        return None
    from clipgraft_llm.tower.text_only import open_text_model

    return open_text_model(uri)


@hookimpl
def clipgraft_claims() -> list[Component]:
    """Claims."""
    rows = (
        (
            "llm2clip",
            "llm2clip.claims:LLM2CLIP",
            "A text model that knows more words finds pictures by descriptions no caption was written in",
            LLM2CLIP,
        ),
        (
            "long-clip",
            "longclip.claims:LONG_CLIP",
            "Long captions are read and found, short ones and classes kept",
            LONGCLIP,
        ),
        (
            "long-clip-components",
            "longclip.claims:COMPONENTS",
            "Reduced images beat whole ones for short captions",
            LONGCLIP,
        ),
        ("long-clip-positions", "longclip.claims:POSITIONS", "Untrained, kept positions beat resampled ones", LONGCLIP),
        (
            "long-clip-over-interpolation",
            "longclip.claims:INTERPOLATION",
            "Trained, kept positions beat resampled ones",
            LONGCLIP,
        ),
        (
            "negclip",
            "negatives.claims:NEGCLIP",
            "Wrong captions teach which colour belongs to which object, words alone don't, classes are kept",
            NEGCLIP,
        ),
        (
            "tinyclip",
            "tiny.claims:TINYCLIP",
            "Half of the parameters keep most of the zero-shot accuracy, by inheritance and a teacher",
            TINYCLIP,
        ),
    )
    return [
        Component(name=name, target=f"{_PACKAGE}.{target}", summary=summary, needs=("clipgraft-toyworld",), paper=paper)
        for name, target, summary, paper in rows
    ]


@hookimpl
def clipgraft_commands() -> list[CommandSpec]:
    """`clipgraft llm`."""
    return [
        CommandSpec(
            name="llm", target=f"{_PACKAGE}.commands:app", help="Other text towers, longer texts, sharper words."
        )
    ]
