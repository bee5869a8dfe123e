"""The core's own manifest: a plugin like any other, named ``core``."""

from __future__ import annotations

from clipgraft.spec import CommandSpec, Component, hookimpl


@hookimpl
def clipgraft_grafts() -> list[Component]:
    """Grafts."""
    return [
        Component(
            name="freeze",
            target="clipgraft.encoders.grafts:Freeze",
            config="clipgraft.encoders.grafts:Freeze",
            summary="Take the gradient from towers, all but named parts",
        ),
        Component(
            name="lora",
            target="clipgraft.encoders.lora:Lora",
            config="clipgraft.encoders.lora:Lora",
            summary="Train low-rank adapters in frozen towers; plain weights again at export",
            paper="Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, arXiv 2106.09685",
        ),
        Component(
            name="resize-positions",
            target="clipgraft.encoders.grafts:ResizePositions",
            config="clipgraft.encoders.grafts:ResizePositions",
            summary="Another image size: the grid of position embeddings is resampled",
        ),
    ]


@hookimpl
def clipgraft_losses() -> list[Component]:
    """Losses."""
    return [
        Component(
            name="clip",
            target="clipgraft.losses.contrastive:ClipLoss",
            summary="Symmetric cross-entropy over all image-text pairs of the global batch",
            paper="Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021",
        ),
        Component(
            name="siglip",
            target="clipgraft.losses.sigmoid:SigLipLoss",
            summary="A yes-or-no question for every image-text pair of the global batch",
            paper="Zhai et al., Sigmoid Loss for Language Image Pre-Training, ICCV 2023, arXiv 2303.15343",
        ),
        Component(
            name="distill",
            target="clipgraft.losses.distill:distill",
            config="clipgraft.losses.distill:DistillConfig",
            summary="Stay close to a frozen teacher, in embeddings, features or similarities",
        ),
    ]


@hookimpl
def clipgraft_heads() -> list[Component]:
    """Heads."""
    return [
        Component(
            name="zero-shot",
            target="clipgraft.heads.zero_shot:ZeroShotHead",
            config="clipgraft.heads.zero_shot:ZeroShotConfig",
            summary="A classifier written in words",
        ),
        Component(
            name="linear-probe",
            target="clipgraft.heads.linear_probe:LinearProbe",
            config="clipgraft.heads.linear_probe:LinearProbeConfig",
            summary="A linear classifier fitted to labels",
        ),
    ]


@hookimpl
def clipgraft_evaluators() -> list[Component]:
    """Evaluators, each its own config."""
    table = {
        "zero-shot": ("zero_shot:ZeroShot", "Classification by class names", ""),
        "retrieval": ("retrieval:Retrieval", "Image-to-text and text-to-image recall", ""),
        "pairs": (
            "pairs:Pairs",
            "Minimal pairs: each text must pick its image, per visual pattern",
            "Tong et al., Eyes Wide Shut? Exploring the Visual Shortcomings of MLLMs, CVPR 2024, arXiv 2401.06209",
        ),
        "linear-probe": ("probe:Probe", "What a linear classifier reads from the features", ""),
    }
    return [
        Component(name=name, target=target, config=target, summary=summary, paper=paper)
        for name, (attribute, summary, paper) in table.items()
        for target in [f"clipgraft.evaluation.{attribute}"]
    ]


@hookimpl
def clipgraft_recipes() -> list[Component]:
    """Recipes."""
    return [
        Component(
            name="finetune",
            target="clipgraft.finetune:Finetune",
            config="clipgraft.finetune:FinetuneConfig",
            summary="Train on image-text pairs with any losses and grafts",
            presets="clipgraft.recipes",
        ),
        Component(
            name="pipeline",
            target="clipgraft.pipeline:Pipeline",
            config="clipgraft.pipeline:PipelineConfig",
            summary="Recipes one after another, each on the model that the one before it left",
            presets="clipgraft.recipes",
        ),
    ]


@hookimpl
def clipgraft_commands() -> list[CommandSpec]:
    """The commands of the core, in the order of the help."""
    table = {
        "run": ("run:run", "Run a recipe: post-train, adapt or merge a model."),
        "eval": ("evaluate:evaluate", "Measure a model with one or more evaluators."),
        "export": ("export:export", "Write a model as a directory that clipgraft and open_clip can open."),
        "list": ("plugins:list_components", "List recipes, encoders, losses, evaluators and all other components."),
        "show": ("plugins:show", "Show one component: summary, paper, settings, presets."),
        "config": ("config:app", "Show, describe or compare run configurations."),
        "plugins": ("plugins:app", "List, show and diagnose plugins."),
        "new": ("new:app", "Write a plugin that installs, runs and passes its tests, from a template."),
    }
    return [CommandSpec(name=k, target=f"clipgraft.cli.{target}", help=text) for k, (target, text) in table.items()]
