"""Registration hooks: what a plugin manifest may implement. Each returns a list of records and has no effects."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

from clipgraft.spec import CommandSpec, Component

if TYPE_CHECKING:
    from clipgraft.encoders.base import Encoder

hookspec = pluggy.HookspecMarker("clipgraft")


@hookspec
def clipgraft_encoders() -> list[Component]:  # type: ignore[empty-body]
    """Encoders; the target is called with its config's fields and returns an ``Encoder``."""


@hookspec
def clipgraft_grafts() -> list[Component]:  # type: ignore[empty-body]
    """Grafts: serialisable structural changes ``(Encoder) -> Encoder``, applied in config order."""


@hookspec
def clipgraft_heads() -> list[Component]:  # type: ignore[empty-body]
    """Heads: modules on top of features that a stage can name."""


@hookspec
def clipgraft_losses() -> list[Component]:  # type: ignore[empty-body]
    """Losses: pure modules, tensors in, named scalars out."""


@hookspec
def clipgraft_datasets() -> list[Component]:  # type: ignore[empty-body]
    """Data sources, used as ``plugin/name?key=value``."""


@hookspec
def clipgraft_evaluators() -> list[Component]:  # type: ignore[empty-body]
    """Evaluators ``(features, source) -> Evaluation``."""


@hookspec
def clipgraft_suites() -> list[Component]:  # type: ignore[empty-body]
    """Suites: the target is a function ``(encoder) -> Sequence[str]`` of "NAME@SRC" entries that suit the model."""


@hookspec
def clipgraft_recipes() -> list[Component]:  # type: ignore[empty-body]
    """Recipes; the target is called with the whole config object, presets are YAML files in the ``presets`` folder."""


@hookspec
def clipgraft_run_hooks() -> list[Component]:  # type: ignore[empty-body]
    """Lifecycle hooks (see ``clipgraft.runhooks``) that a config may switch on by name."""


@hookspec
def clipgraft_claims() -> list[Component]:  # type: ignore[empty-body]
    """A paper's statements as measurable experiments; the target is the ``Claim`` itself."""


@hookspec
def clipgraft_exporters() -> list[Component]:  # type: ignore[empty-body]
    """Formats of ``clipgraft export``; the target ``(model, out, *, registry)`` returns {"export": path, ...}."""


@hookspec
def clipgraft_reports() -> list[Component]:  # type: ignore[empty-body]
    """Sections of a run's page; the target ``(run, *, registry)`` returns them (see ``clipgraft.reporting``)."""


@hookspec
def clipgraft_commands() -> list[CommandSpec]:  # type: ignore[empty-body]
    """At most one command group, named like the plugin."""


@hookspec(firstresult=True)
def clipgraft_open(uri: str) -> Encoder | None:
    """Open the model reference ``uri`` if it is this plugin's; None leaves it to the next."""
