"""The manifest: what this package offers, as strings. Importing it imports nothing heavy."""

from clipgraft.spec import CommandSpec, Component, hookimpl


def _part(name: str, module: str, target: str, config: str | None, summary: str, presets: str | None = None):
    """A record whose target and config lie in one module."""
    where = f"clipgraft_cookbook.{module}"
    config = config and f"{where}:{config}"
    return Component(name=name, target=f"{where}:{target}", config=config, summary=summary, presets=presets)


@hookimpl
def clipgraft_losses():
    return [_part("hardest", "loss", "Hardest", "HardestConfig", "Only the hardest wrong pair of each row counts")]


@hookimpl
def clipgraft_heads():
    return [_part("residual", "head", "Residual", "ResidualConfig", "A linear change of embeddings that can be folded")]


@hookimpl
def clipgraft_grafts():
    return [_part("drop-blocks", "graft", "DropBlocks", "DropBlocks", "A shallower image tower")]


@hookimpl
def clipgraft_recipes():
    summary = "Learn a linear change of image embeddings from class folders, then fold it into the model"
    return [_part("fold", "recipe", "Fold", "FoldConfig", summary, presets="clipgraft_cookbook.recipes")]


@hookimpl
def clipgraft_evaluators():
    return [_part("sure", "evaluator", "Sure", "Sure", "By how much the right class is ahead of all others")]


@hookimpl
def clipgraft_run_hooks():
    return [_part("throughput", "hook", "Throughput", None, "Writes the images per second of every stage")]


@hookimpl
def clipgraft_commands():
    return [CommandSpec(name="cookbook", target="clipgraft_cookbook.command:app", help="How large a model is.")]
