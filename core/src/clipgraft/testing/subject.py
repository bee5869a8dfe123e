"""The plugin that a conformance check looks at, and how a check says what it found."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from clipgraft.errors import InputError
from clipgraft.manifests import PluginInfo, Registered, scan
from clipgraft.registry import COMMANDS_OF, Registry
from clipgraft.spec import KINDS, CommandSpec


class Violation(AssertionError):
    """The plugin doesn't keep a rule: one line that says what was found, and what to change."""


class NotApplicable(Exception):
    """There is nothing to check here, and why."""


@dataclass(frozen=True)
class Subject:
    """An installed plugin by name, or one in a file: ``files`` holds its path."""

    name: str
    files: tuple[Path, ...] = ()

    @classmethod
    def of(cls, reference: str) -> Subject:
        """``NAME`` of an installed plugin, or ``FILE.py``."""
        if not reference.endswith(".py"):
            return cls(reference)
        path = Path(reference).resolve()
        return cls(path.stem.replace("_", "-"), (path,))

    def registry(self) -> Registry:
        """What is installed, with this plugin; raises when it is not there or not in use."""
        registry = Registry.discover(files=self.files)
        found = [info for info in registry.plugins if info.name == self.name]
        if not found:
            known = ", ".join(info.name for info in registry.plugins)
            raise InputError(f"plugin {self.name!r} is not installed (known: {known}); pip install -e . in its folder")
        if found[0].status != "ok":
            raise Violation(f"plugin {self.name} is {found[0].status}: {found[0].error or 'see CLIPGRAFT_PLUGINS'}")
        return registry

    def info(self) -> PluginInfo:
        """The plugin as found, without importing it."""
        found = [info for info, _ in scan(self.files) if info.name == self.name]
        if not found:
            raise InputError(f"plugin {self.name!r} is not installed; pip install -e . in its folder")
        return found[0]

    def offers(self, registry: Registry) -> list[Registered]:
        """Its components, by kind and name."""
        return [r for kind in KINDS for r in registry.list(kind) if r.plugin == self.name]

    def commands(self, registry: Registry) -> list[CommandSpec]:
        """Its command groups; the core's own are those that belong to no plugin."""
        plugins = {info.name for info in registry.plugins} - {"core"}
        owned = {plugin: {plugin, *COMMANDS_OF.get(plugin, ())} for plugin in plugins}
        if self.name == "core":
            return [c for c in registry.commands() if not any(c.name in names for names in owned.values())]
        return [c for c in registry.commands() if c.name in owned[self.name]]

    def package(self) -> str:
        """The top-level package (or the module of a file) that its manifest lies in."""
        return self.files[0].stem if self.files else module_of(self.name).partition(".")[0]

    def sources(self) -> list[Path]:
        """Its Python files."""
        if self.files:
            return [*self.files]
        spec = importlib.util.find_spec(self.package())
        folders = list(spec.submodule_search_locations or ()) if spec else []
        if not folders and spec and spec.origin:
            return [Path(spec.origin)]
        return sorted(path for folder in folders for path in Path(folder).rglob("*.py"))


def module_of(name: str) -> str:
    """The manifest's module, as the entry point of the plugin ``name`` says."""
    from importlib.metadata import entry_points

    from clipgraft.spec import API_GROUP

    if name == "core":
        return "clipgraft.core_plugin"
    return next((e.module for e in entry_points(group=API_GROUP) if e.name == name), name)


def other_packages(subject: Subject) -> set[str]:
    """Top-level packages of every other installed plugin, whatever its status."""
    from importlib.metadata import entry_points

    points = entry_points()
    groups = [group for group in points.groups if re.fullmatch(r"clipgraft\.v\d+", group)]
    found = {e.module.partition(".")[0] for group in groups for e in points.select(group=group)}
    return found - {subject.package(), "clipgraft"}
