"""Plugin manifests: find them without importing, import one, check the records that its hooks return."""

from __future__ import annotations

import importlib.metadata as metadata
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar

import pluggy

from clipgraft.errors import ClipgraftError, InputError, PluginError, unknown_name
from clipgraft.spec import API_GROUP, KINDS, CommandSpec, Component, Kind

R = TypeVar("R", Component, CommandSpec)
Load = Callable[[], ModuleType]
Status = Literal["ok", "disabled", "broken", "incompatible", "duplicate"]

FILE = "(file)"
"""The distribution of a plugin that is one file."""

PLURALS: dict[str, Kind] = {"losses" if kind == "loss" else f"{kind}s": kind for kind in KINDS}
"""Kinds as people and hook names write them."""

_KIND_OF_HOOK: dict[str, Kind] = {f"clipgraft_{plural.replace('-', '_')}": kind for plural, kind in PLURALS.items()}


@dataclass(slots=True)
class PluginInfo:
    """A plugin as found. ``components`` are full names, ``load_ms`` is import and hooks [ms], ``error`` one line."""

    name: str
    distribution: str
    version: str = ""
    status: Status = "ok"
    components: list[str] = field(default_factory=list)
    load_ms: float = 0.0
    error: str = ""
    traceback: str = ""
    path: str = ""


@dataclass(frozen=True, slots=True)
class Registered:
    """A component and the plugin that gave it."""

    plugin: str
    kind: Kind
    component: Component

    @property
    def name(self) -> str:
        """``plugin/component``."""
        return f"{self.plugin}/{self.component.name}"


class HookManager(pluggy.PluginManager):
    """A plugin manager for the hooks of ``specs``, whose names start with ``prefixes``."""

    def __init__(self, project: str, specs: ModuleType | type, prefixes: tuple[str, ...]) -> None:
        super().__init__(project)
        self.prefixes = prefixes
        self.add_hookspecs(specs)
        self.known = [name for name in dir(specs) if name.startswith(prefixes)]

    def parse_hookimpl_opts(self, plugin: object, name: str) -> Any:
        """Look at our prefixes only: older pluggy evaluates every property of what it inspects."""
        return super().parse_hookimpl_opts(plugin, name) if name.startswith(self.prefixes) else None

    def add(self, plugin: object, name: str) -> list[tuple[str, Any]]:
        """Register ``plugin`` and return its (hook, implementation) pairs; after an error it is not registered."""
        found = []
        try:
            self.register(plugin, name=name)
            for caller in self.get_hookcallers(plugin) or ():
                for impl in (i for i in caller.get_hookimpls() if i.plugin is plugin):
                    if not caller.has_spec():
                        raise unknown_name("hook", caller.name, self.known)
                    if impl.kwargnames or impl.wrapper or impl.hookwrapper:
                        raise PluginError(f"hook {caller.name} must be a plain function without default arguments")
                    found.append((caller.name, impl))
        except Exception:
            if self.has_plugin(name):
                self.unregister(name=name)
            raise
        return found


def scan(files: Iterable[Path] = ()) -> list[tuple[PluginInfo, Load]]:
    """The core, every installed entry point of any API major, and ``files``, by name; nothing is imported."""
    points = metadata.entry_points()
    everything = [e for g in points.groups if re.fullmatch(r"clipgraft\.v\d+", g) for e in points.select(group=g)]
    ours = {(e.name, e.dist and e.dist.name) for e in everything if e.group == API_GROUP}
    found: list[tuple[PluginInfo, Load]] = []
    for entry in everything:
        info = PluginInfo(entry.name, entry.dist.name if entry.dist else "", entry.dist.version if entry.dist else "")
        if entry.group != API_GROUP:
            if (entry.name, entry.dist and entry.dist.name) in ours:  # one package may serve several majors
                continue
            info.status = "incompatible"
            info.error = f"made for {entry.group}, this is {API_GROUP}; install a release of it for this clipgraft"
        found.append((info, entry.load))
    for path in files:
        if not path.is_file():
            raise InputError(f"--plugin {path}: no such file; give the path of a plugin's Python file")
        found.append((PluginInfo(path.stem.replace("_", "-"), FILE, path=str(path)), partial(_import_file, path)))
    try:
        version = metadata.version("clipgraft")
    except metadata.PackageNotFoundError:  # imported from a source tree
        version = ""
    core = partial(importlib.import_module, "clipgraft.core_plugin")
    return [(PluginInfo("core", "clipgraft", version), core), *sorted(found, key=lambda pair: pair[0].name)]


def read(manager: HookManager, info: PluginInfo, load: Load) -> tuple[list[Registered], list[CommandSpec]]:
    """Import one manifest and call its hooks. A failure drops all of it: half a plugin fails later, stranger."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", info.name):
        raise PluginError(f"plugin name {info.name!r} is not lower-case letters, digits, dots and hyphens")
    module = load()
    info.path = getattr(module, "__file__", None) or info.path
    components: list[Registered] = []
    commands: list[CommandSpec] = []
    for hook, impl in manager.add(module, info.name):
        if hook == "clipgraft_open":
            continue
        try:
            returned = impl.function()
        except Exception as error:
            raise PluginError(f"hook {hook} raised {one_line(error)}") from error
        if hook == "clipgraft_commands":
            commands += _checked(hook, CommandSpec, returned)
        else:
            kind = _KIND_OF_HOOK[hook]
            components += [Registered(info.name, kind, record) for record in _checked(hook, Component, returned)]
    keys = [(r.kind, r.name) for r in components]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise PluginError(f"offers {' and '.join(f'{kind} {name}' for kind, name in twice)} twice")
    return components, commands


def one_line(error: BaseException) -> str:
    """``Type: message`` without line breaks; our own errors are their message."""
    try:
        said = str(error)
    except Exception:  # errors of others are code of others
        said = ""
    text = said if isinstance(error, ClipgraftError) else f"{type(error).__name__}: {said}"
    return " ".join(text.split()).removesuffix(":")


def _checked(hook: str, record: type[R], returned: object) -> list[R]:
    """The records that a hook returned, checked as far as strings can be."""
    if not isinstance(returned, list) or not all(isinstance(item, record) for item in returned):
        raise PluginError(f"hook {hook} must return a list of {record.__name__}, got {returned!r:.80}")
    for item in returned:
        for target in (item.target, getattr(item, "config", None) or item.target):
            if not re.fullmatch(r"[\w.]+:[\w.]+", target) or not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", item.name):
                raise PluginError(f"{item.name!r} -> {target!r}: expected a lower-case name and 'package.module:name'")
    return returned


def _import_file(path: Path) -> ModuleType:
    """Import a file as the module named like it, so that its records can name their targets as ``stem:attribute``."""
    known = importlib.util.find_spec(path.stem) if path.stem.isidentifier() else None
    if not path.stem.isidentifier() or (known and Path(known.origin or "").resolve() != path.resolve()):
        raise InputError(f"{path.name} can't be imported as {path.stem!r}; rename the file to an unused Python name")
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    if spec is None or spec.loader is None:
        raise InputError(f"{path.name} is not a Python file; its name must end in .py")
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module
