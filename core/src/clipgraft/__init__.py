"""clipgraft: post-train, adapt, merge, evaluate and ship CLIP. Names load on first use, so importing is cheap."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipgraft.encoders import load
    from clipgraft.encoders.base import Encoder
    from clipgraft.errors import ClipgraftError, InputError
    from clipgraft.evaluation import evaluate
    from clipgraft.recipe import StagePlan
    from clipgraft.registry import PluginInfo, Registry
    from clipgraft.run import run_recipe as run
    from clipgraft.spec import CommandSpec, Component, hookimpl, runhook
    from clipgraft.stage import JobStage, StageResult, TrainStage
    from clipgraft.types import Batch, FeatureRequest, ImageFeatures, StepOutput, TextFeatures

    __version__: str

_MODULES = {
    "encoders": ("load",),
    "encoders.base": ("Encoder",),
    "errors": ("ClipgraftError", "InputError"),
    "evaluation": ("evaluate",),
    "recipe": ("StagePlan",),
    "registry": ("Registry",),
    "run": ("run",),
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
    return getattr(import_module(_SOURCES[name]), name) if name != "run" else import_module("clipgraft.run")


class _Package(ModuleType):
    """Makes the submodule ``clipgraft.run`` callable as ``run_recipe``, since module and function share the name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "run" and isinstance(value, ModuleType):
            value.__class__ = _RunModule
        super().__setattr__(name, value)


class _RunModule(ModuleType):
    def __call__(self, *args: Any, **settings: Any) -> Any:
        return self.run_recipe(*args, **settings)


sys.modules[__name__].__class__ = _Package
