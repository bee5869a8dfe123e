"""The core's own manifest: a plugin like any other, named ``core``."""

from __future__ import annotations

from clipgraft.spec import CommandSpec, hookimpl


@hookimpl
def clipgraft_commands() -> list[CommandSpec]:
    """The commands of the core, in the order of the help."""
    table = {
        "demo": "Improve a tiny CLIP, measure it before and after, open a report.",
        "run": "Run a recipe: post-train, adapt or merge a model.",
        "eval": "Measure a model with one or more evaluators.",
        "export": "Write a model as a directory that clipgraft and open_clip can open.",
        "report": "Write the HTML report of a run.",
        "claims": "Check the papers' claims by experiment.",
        "list": "List recipes, encoders, grafts, heads, losses, datasets, evaluators, claims or run-hooks.",
        "show": "Show one component: summary, paper, settings, presets.",
        "config": "Show, describe or compare run configurations.",
        "plugins": "List, show and diagnose plugins.",
    }
    modules = {"eval": "evaluate", "list": "plugins", "show": "plugins"}
    functions = {"eval": "evaluate", "list": "list_components", "show": "show", "config": "app", "plugins": "app"}
    return [
        CommandSpec(name=name, target=f"clipgraft.cli.{modules.get(name, name)}:{functions.get(name, name)}", help=text)
        for name, text in table.items()
    ]
