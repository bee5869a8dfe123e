"""Sections of the page that plugins write: asked for one after the other, none can cost another."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

from clipgraft.errors import PluginError
from clipgraft.reporting import Section
from clipgraft.rundir import RunRecord
from clipgraft_evaluation.page import told

if TYPE_CHECKING:
    from clipgraft.log import RunLog
    from clipgraft.manifests import Registered
    from clipgraft.registry import Registry


def contributed(
    run: RunRecord, *, registry: Registry, missing: list[tuple[str, str]], log: RunLog | None = None
) -> list[Section]:
    """What every report of the registry says of ``run``; why one could not goes into ``missing``."""
    found, offered = list[Section](), registry.list("report")
    with log.progress("sections of plugins", len(offered)) if log else nullcontext() as bar:
        for registered in offered:
            title = registered.component.summary or registered.name
            found += told(lambda r=registered: _asked(r, run, registry), title, missing) or []  # type: ignore[misc]
            if bar is not None:
                bar.advance(note=registered.name)
    return found


def _asked(registered: Registered, run: RunRecord, registry: Registry) -> list[Section]:
    """One report's sections, checked: an object of another kind would fail inside the template, far from its plugin."""
    made = registry.build("report", registered.name, {})(run, registry=registry)
    sections = list(made)
    if odd := [section for section in sections if not isinstance(section, Section)]:
        raise PluginError(
            f"{registered.name} gave {odd[0]!r:.80}; a report returns clipgraft.reporting.Section records"
        )
    return sections
