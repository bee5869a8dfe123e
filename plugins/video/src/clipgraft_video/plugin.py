"""The manifest: what this plugin offers, as strings."""

from __future__ import annotations

from typing import Any

from clipgraft.spec import CommandSpec, Component, hookimpl

_PACKAGE = "clipgraft_video"
DIST = (
    "Qing et al., Disentangling Spatial and Temporal Learning for Efficient Image-to-Video Transfer Learning, "
    "ICCV 2023, arXiv 2309.07911"
)
EZCLIP = "Ahmad et al., EZ-CLIP: Efficient Zero-Shot Video Action Recognition, arXiv 2312.08010"
FROSTER = (
    "Huang et al., FROSTER: Frozen CLIP Is A Strong Teacher for Open-Vocabulary Action Recognition, ICLR 2024, "
    "arXiv 2402.03241"
)
M2CLIP = (
    "Wang et al., M2-CLIP: A Multimodal, Multi-task Adapting Framework for Video Action Recognition, AAAI 2024, "
    "arXiv 2401.11649"
)
PROMPT_SWITCH = (
    "Deng et al., Prompt Switch: Efficient CLIP Adaptation for Text-Video Retrieval, ICCV 2023, arXiv 2308.07648"
)
ILA = (
    "Tu et al., Implicit Temporal Modeling with Learnable Alignment for Video Recognition, ICCV 2023, arXiv 2304.10465"
)
TEMPME = (
    "Shen et al., TempMe: Video Temporal Token Merging for Efficient Text-Video Retrieval, ICLR 2025, arXiv 2409.01156"
)
XCLIP = (
    "Ni et al., Expanding Language-Image Pretrained Models for General Video Recognition, ECCV 2022, arXiv 2208.02816"
)
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
def clipgraft_grafts() -> list[Component]:
    """Image towers whose frames see each other."""
    rows = (
        ("x-clip", "xclip.graft:XClipGraft", "Frames exchange messages in every block; prompts by videos", XCLIP),
        ("ez-clip", "ezclip.graft:EzClipGraft", "Temporal prompts and adapters in frozen towers", EZCLIP),
        ("neighbours", "froster.view:FrosterView", "Frames attend to their neighbours, without parameters", FROSTER),
        ("ila", "ila.graft:IlaGraft", "Neighbouring frames are aligned before every block; prompts by videos", ILA),
        ("vifi-prompts", "vifi.prompts:VifiPromptsGraft", "Learnt tokens in both towers, in several blocks", VIFI),
        ("m2-clip", "m2clip.graft:M2ClipGraft", "Adapters over frames and their differences; a classifier", M2CLIP),
        ("tempme", "tempme.graft:TempMeGraft", "Tokens merge within and between frames; low-rank updates", TEMPME),
        ("dist", "distnet.graft:DistGraft", "Networks for time and space beside a frozen tower", DIST),
        ("prompt-switch", "promptswitch.graft:PromptSwitchGraft", "Frames exchange prompts of a cube", PROMPT_SWITCH),
    )
    return [
        Component(name=name, target=target, config=target, summary=summary, paper=paper)
        for name, where, summary, paper in rows
        for target in [f"{_PACKAGE}.{where}"]
    ]


@hookimpl
def clipgraft_recipes() -> list[Component]:
    """Recipes."""
    rows = (
        ("vifi-clip", "vifi.recipe", "ViFiClip", "VifiConfig", "Fine-tune; a video is the mean of its frames", VIFI),
        (
            "vifi-clip-prompts",
            "vifi.prompts_recipe",
            "ViFiClipPrompts",
            "VifiPromptsConfig",
            "Bridge and prompt: learnt tokens in a fine-tuned, frozen CLIP",
            VIFI,
        ),
        ("x-clip", "xclip.recipe", "XClip", "XClipConfig", "Messages between frames, prompts by videos", XCLIP),
        ("ez-clip", "ezclip.recipe", "EzClip", "EzClipConfig", "Temporal prompts, adapters, a motion loss", EZCLIP),
        ("froster", "froster.recipe", "Froster", "FrosterConfig", "Fine-tune beside the frozen CLIP", FROSTER),
        ("ila", "ila.recipe", "Ila", "IlaConfig", "Learnt alignment of neighbouring frames", ILA),
        ("m2-clip", "m2clip.recipe", "M2Clip", "M2ClipConfig", "Adapters for four tasks; frozen towers", M2CLIP),
        ("tempme", "tempme.recipe", "TempMe", "TempMeConfig", "Retrieval with tokens merged over frames", TEMPME),
        ("dist", "distnet.recipe", "Dist", "DistConfig", "Networks for time and space beside two frozen towers", DIST),
        (
            "prompt-switch",
            "promptswitch.recipe",
            "PromptSwitch",
            "PromptSwitchConfig",
            "Retrieval with a cube of prompts; captions written in training",
            PROMPT_SWITCH,
        ),
    )
    return [
        Component(
            name=name,
            target=f"{_PACKAGE}.{module}:{recipe}",
            config=f"{_PACKAGE}.{module}:{config}",
            summary=summary,
            paper=paper,
            presets=f"{_PACKAGE}.recipes",
        )
        for name, module, recipe, config, summary, paper in rows
    ]


@hookimpl
def clipgraft_evaluators() -> list[Component]:
    """Evaluators."""
    return [
        Component(name=name, target=target, config=target, summary=summary)
        for name, where, summary in (
            (
                "classification",
                "evaluator:Classification",
                "Videos by the texts of their classes, with several views",
            ),
            ("classifier", "m2clip.evaluator:TrainedClassifier", "Videos by a model's own classifier (M2-CLIP)"),
            ("text-retrieval", "evaluator:VideoRetrieval", "Captions by videos and videos by captions"),
            ("order", "order:Order", "Opposite classes, and the same videos backwards and with shuffled frames"),
            ("cost", "cost:Cost", "Operations and seconds per video, beside another model"),
        )
        for target in [f"{_PACKAGE}.{where}"]
    ]


@hookimpl
def clipgraft_reports() -> list[Component]:
    """Sections of a run's page."""
    return [
        Component(
            name="film-strips",
            target=f"{_PACKAGE}.film_strips:film_strips",
            summary="Videos frame by frame, with what the trained model says as they go on",
        ),
        Component(
            name="message-attention",
            target=f"{_PACKAGE}.xclip.attention:message_attention",
            summary="Which frame hears which in X-CLIP's blocks",
            paper=XCLIP,
        ),
    ]


@hookimpl
def clipgraft_claims() -> list[Component]:
    """Claims."""
    rows = (
        ("video-order", "ORDER", "Adapters over frames tell opposite motions apart, a mean of frames can't", M2CLIP),
        (
            "froster",
            "FROSTER",
            "Fine-tuning beside the frozen CLIP keeps pictures and learns what carries over",
            FROSTER,
        ),
        ("froster-unseen", "UNSEEN", "It tells unseen combinations better than the same fine-tune alone", FROSTER),
        ("tempme", "TEMPME", "Nearly half of the operations saved, at a loss of recall below five points", TEMPME),
        ("tempme-over-fewer-frames", "FRAMES", "Merging is better than every second frame at the same cost", TEMPME),
    )
    return [
        Component(
            name=name,
            target=f"{_PACKAGE}.claims:{attribute}",
            summary=summary,
            needs=("clipgraft-toyworld",),
            paper=paper,
        )
        for name, attribute, summary, paper in rows
    ]


@hookimpl
def clipgraft_open(uri: str) -> Any:
    """``xclip:DIR``: what transformers' XCLIPModel saved."""
    if not uri.startswith("xclip:"):
        return None
    from clipgraft_video.xclip.transformers_import import open_xclip

    return open_xclip(uri.removeprefix("xclip:"))


@hookimpl
def clipgraft_commands() -> list[CommandSpec]:
    """`clipgraft video`."""
    return [CommandSpec(name="video", target=f"{_PACKAGE}.commands:app", help="Videos with a CLIP.")]
