"""clipgraft: post-train, adapt, merge, evaluate and ship CLIP. Names load on first use, so importing is cheap."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipgraft.encoders import load
    from clipgraft.encoders.base import Encoder
    from clipgraft.errors import ClipgraftError, InputError
    from clipgraft.evaluation import evaluate
    from clipgraft.execution import run_recipe as run
    from clipgraft.recipe import StagePlan
    from clipgraft.registry import PluginInfo, Registry
    from clipgraft.spec import CommandSpec, Component, hookimpl, runhook
    from clipgraft.stage import JobStage, StageResult, TrainStage
    from clipgraft.types import Batch, FeatureRequest, ImageFeatures, StepOutput, TextFeatures

    __version__: str

_MODULES = {
    "encoders": ("load",),
    "encoders.base": ("Encoder",),
    "execution": ("run",),
    "errors": ("ClipgraftError", "InputError"),
    "evaluation": ("evaluate",),
    "recipe": ("StagePlan",),
    "registry": ("Registry",),
    "spec": ("CommandSpec", "Component", "hookimpl", "runhook"),
    "stage": ("JobStage", "StageResult", "TrainStage"),
    "types": ("Batch", "FeatureRequest", "ImageFeatures", "StepOutput", "TextFeatures"),
}
_SOURCES = {name: f"clipgraft.{module}" for module, names in _MODULES.items() for name in names}

__all__ = ["Batch", "ClipgraftError", "CommandSpec", "Component", "Encoder", "FeatureRequest", "ImageFeatures"]
__all__ += [
    "InputError",
    "JobStage",
    "Registry",
    "StagePlan",
    "StageResult",
    "StepOutput",
    "TextFeatures",
    "TrainStage",
]
__all__ += ["__version__", "evaluate", "hookimpl", "load", "plugins", "run", "runhook"]


def plugins() -> list[PluginInfo]:
    """Every plugin that was found, with its status."""
    from clipgraft.registry import current

    return current().plugins


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("clipgraft")
    if name not in _SOURCES:
        raise AttributeError(f"module 'clipgraft' has no attribute {name!r}")
    return getattr(import_module(_SOURCES[name]), "run_recipe" if name == "run" else name)
