"""Discover plugins, isolate the broken ones, resolve names. Importing this and listing import nothing heavy."""

from __future__ import annotations

import builtins
import importlib.metadata as metadata
import importlib.util
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import pluggy

from clipgraft import hookspecs
from clipgraft.errors import ClipgraftError, InputError, PluginError, unknown_name
from clipgraft.spec import API_GROUP, KINDS, CommandSpec, Component, Kind

if TYPE_CHECKING:
    from pydantic import BaseModel

    from clipgraft.encoders.base import Encoder

R = TypeVar("R", Component, CommandSpec)
Status = Literal["ok", "disabled", "broken", "incompatible", "duplicate"]

LATER_COMMANDS = ("compare", "embed", "search", "classify", "data", "new")
"""Names kept for the core beside the commands that it has."""

KNOWN_PLUGINS = {
    "anomaly": "anomalyclip genclip winclip clipn",
    "diffusion": "diva genhancer un2clip sds-clip",
    "evaluation": "",
    "llm": "llm2clip long-clip tinyclip mobileclip",
    "merging": "soup wise-ft ties sam-clip radio clip-moe",
    "toyworld": "images pairs defects videos digits photos clip clip-1 clip-2",
    "video": "vifi-clip x-clip ez-clip froster tempme",
}
"""Plugins of the project and the names people look for, only to say what to install."""

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


class _Manager(pluggy.PluginManager):
    def parse_hookimpl_opts(self, plugin: object, name: str) -> Any:
        """Look at our prefix only: older pluggy evaluates every property of what it inspects."""
        return super().parse_hookimpl_opts(plugin, name) if name.startswith("clipgraft_") else None


class Registry:
    """The plugins of this process and what they offer."""

    def __init__(self) -> None:
        self.plugins: list[PluginInfo] = []
        self._manager = _Manager("clipgraft")
        self._manager.add_hookspecs(hookspecs)
        self._components: dict[tuple[Kind, str], Registered] = {}
        self._commands: list[CommandSpec] = []

    @classmethod
    def discover(
        cls,
        *,
        allow: Iterable[str] | None = None,
        disable: Iterable[str] | None = None,
        files: Sequence[str | os.PathLike[str]] = (),
        strict: bool | None = None,
    ) -> Self:
        """Load the core's manifest, those of installed plugins, and ``files``; the core and files are never filtered.

        None reads CLIPGRAFT_PLUGINS (allowlist, empty for none), CLIPGRAFT_DISABLE and CLIPGRAFT_STRICT. Failures are
        isolated, one line each on stderr; ``strict`` raises the first instead.
        """
        allowed, disabled = _names("CLIPGRAFT_PLUGINS", allow), _names("CLIPGRAFT_DISABLE", disable) or set()
        strict = os.environ.get("CLIPGRAFT_STRICT", "0") not in ("", "0") if strict is None else strict
        registry, found = cls(), _scan()
        for path in map(Path, files):
            if not path.is_file():
                raise InputError(f"--plugin {path}: no such file; give the path of a plugin's Python file")
            info = PluginInfo(path.stem.replace("_", "-"), "(file)", path=str(path))
            found.append((info, lambda path=path: _import_file(path)))
        found.sort(key=lambda pair: (pair[0].name != "core", pair[0].name))
        for info, load in found:
            rivals = [i for i, _ in found if i.name == info.name and i is not info and i.status != "incompatible"]
            installed = info.distribution != "(file)" and info.name != "core"
            if installed and (info.name in disabled or (allowed is not None and info.name not in allowed)):
                info.status = "disabled"
            elif info.status == "ok" and rivals and load is not _import_core:
                info.status = "duplicate"
                info.error = f"also offered by {', '.join(r.distribution for r in rivals)}; uninstall one of them"
            registry.plugins.append(info)
            if info.status == "ok":
                with redirect_stdout(sys.stderr):  # a manifest that prints must not spoil --json
                    registry._load(info, load)
            if info.status not in ("ok", "disabled"):
                line = f"plugin {info.name} is {info.status}: {info.error}"
                if strict:
                    raise PluginError(line)
                print(f"clipgraft: {line} (see: clipgraft plugins doctor)", file=sys.stderr)
        for name in sorted((allowed or set()) - {info.name for info, _ in found}):
            print(f"clipgraft: CLIPGRAFT_PLUGINS names {name!r}, which is not installed", file=sys.stderr)
        return registry

    def _load(self, info: PluginInfo, load: Callable[[], ModuleType]) -> None:
        """Import one manifest and call its hooks; any failure marks the plugin and drops all its records."""
        start, components, commands = time.perf_counter(), list[Registered](), list[CommandSpec]()
        try:
            if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", info.name):
                raise PluginError(f"plugin name {info.name!r} is not lower-case letters, digits, dots and hyphens")
            module = load()
            info.path = getattr(module, "__file__", None) or info.path
            self._manager.register(module, name=info.name)
            for caller in self._manager.get_hookcallers(module) or ():
                for impl in (i for i in caller.get_hookimpls() if i.plugin is module):
                    if not caller.has_spec():
                        raise unknown_name(
                            "hook", caller.name, [*_KIND_OF_HOOK, "clipgraft_commands", "clipgraft_open"]
                        )
                    if impl.kwargnames or impl.wrapper or impl.hookwrapper:
                        raise PluginError(f"hook {caller.name} must be a plain function without default arguments")
                    if caller.name == "clipgraft_commands":
                        commands += _records(caller.name, CommandSpec, impl.function())
                    elif caller.name != "clipgraft_open":
                        kind, records = _KIND_OF_HOOK[caller.name], _records(caller.name, Component, impl.function())
                        components += [Registered(info.name, kind, record) for record in records]
            if info.name != "core" and [c.name for c in commands] not in ([], [info.name]):
                raise PluginError(f"may offer one command group, named {info.name!r} like itself")
            if commands and info.name in (*LATER_COMMANDS, *(c.name for c in self._commands)):
                raise PluginError(f"command {info.name!r} belongs to the core; rename the plugin")
            keys = [(r.kind, r.name) for r in components]
            if twice := sorted({key for key in keys if keys.count(key) > 1}):
                raise PluginError(f"offers {' and '.join(f'{kind} {name}' for kind, name in twice)} twice")
            self._components.update(zip(keys, components, strict=True))
            self._commands += commands
            info.components = sorted({r.name for r in components})
        except (Exception, SystemExit) as error:  # a manifest that calls sys.exit must not end the tool either
            info.status, info.error, info.traceback = "broken", one_line(error), traceback.format_exc()
            if self._manager.has_plugin(info.name):
                self._manager.unregister(name=info.name)
        info.load_ms = round((time.perf_counter() - start) * 1000, 2)

    def list(self, kind: Kind) -> builtins.list[Registered]:
        """Everything of one kind, by name."""
        if kind not in KINDS:
            raise unknown_name("kind", kind, KINDS)
        return sorted((r for (k, _), r in self._components.items() if k == kind), key=lambda r: r.name)

    def get(self, kind: Kind, name: str) -> Registered:
        """One component by its full name, or by its bare name while that is unique."""
        everything = self.list(kind)
        found = [r for r in everything if name in (r.name, r.component.name)]
        if len(found) == 1:
            return found[0]
        if found:
            raise InputError(f"{kind} {name!r} is ambiguous; write one of {', '.join(r.name for r in found)}")
        known = (r.name if "/" in name else r.component.name for r in everything)
        raise unknown_name(kind, name, set(known), hint=self._hint(name))

    def _hint(self, name: str) -> str:
        """What to do when ``name`` belongs to a plugin that is not in use."""
        plugin, _, bare = name.rpartition("/")
        plugin = plugin or next((p for p, names in KNOWN_PLUGINS.items() if bare in names.split()), "")
        status = next((info.status for info in self.plugins if info.name == plugin), None)
        if status is None:
            return f"It comes with a package: pip install clipgraft-{plugin}" if plugin in KNOWN_PLUGINS else ""
        return "" if status == "ok" else f"Plugin {plugin} is {status}: clipgraft plugins doctor {plugin}"

    def resolve(self, target: str) -> Any:
        """The object that "package.module:attribute" names, imported now."""
        module, _, attribute = target.partition(":")
        try:
            found: Any = importlib.import_module(module)
            for part in attribute.split("."):
                found = getattr(found, part)
        except ClipgraftError:
            raise
        except Exception as error:
            raise PluginError(f"{target} can't be imported: {one_line(error)}") from error
        return found

    def config_class(self, kind: Kind, name: str) -> type[BaseModel] | None:
        """The pydantic model of a component's settings; None when it has none."""
        config = self.get(kind, name).component.config
        return None if config is None else self.resolve(config)

    def build(self, kind: Kind, name: str, settings: Mapping[str, Any]) -> Any:
        """Check ``settings`` and call the target with the config's fields (a recipe: with the config itself).

        A claim's target is the claim and is returned as it is.
        """
        from clipgraft.config.load import validate

        registered = self.get(kind, name)
        for requirement in registered.component.needs:
            if problem := unmet(requirement):
                raise PluginError(
                    f"{registered.name} needs {requirement}, which {problem}: pip install '{requirement}'"
                )
        target, cls = self.resolve(registered.component.target), self.config_class(kind, registered.name)
        if cls is None and settings:
            raise InputError(f"{registered.name} has no settings, got {', '.join(settings)}; leave them out")
        if cls is None:
            return target if kind == "claim" else target()
        config = validate(cls, settings, where=registered.name)
        return target(config) if kind == "recipe" else target(**{f: getattr(config, f) for f in cls.model_fields})

    def commands(self) -> builtins.list[CommandSpec]:
        """The core's commands in their order, then one group per plugin."""
        return [*self._commands]

    def open(self, uri: str) -> Encoder | None:
        """The encoder of the first plugin that recognises ``uri``; None when none does.

        A ``ClipgraftError`` says that a plugin recognised ``uri`` and failed: it ends the search. Any other error is
        that plugin's own; the others are still asked, and it is raised when none of them opens ``uri``.
        """
        failed: PluginError | None = None
        for impl in reversed(self._manager.hook.clipgraft_open.get_hookimpls()):
            try:
                encoder: Encoder | None = impl.function(*[uri for _ in impl.argnames])
            except ClipgraftError:
                raise
            except Exception as error:
                failed = PluginError(f"plugin {impl.plugin_name} failed to open {uri!r}: {one_line(error)}")
                failed.__cause__ = error
                continue
            if encoder is not None:
                return encoder
        if failed is not None:
            raise failed
        return None

    def requires(self, requirements: Iterable[str]) -> None:
        """Raise unless every requirement ("clipgraft-diffusion>=0.1") is met by the core or a plugin in use."""
        for text in requirements:
            idle = [
                i for i in self.plugins if i.status != "ok" and _distribution(text) == _distribution(i.distribution)
            ]
            if problem := unmet(text):
                raise InputError(f"this run requires {text}, which {problem}: pip install '{text}'")
            if idle:
                raise InputError(f"this run requires {text}, but plugin {idle[0].name} is {idle[0].status}")


_current: Registry | None = None


def current() -> Registry:
    """The registry of this process, discovered on first use."""
    global _current
    if _current is None:
        _current = Registry.discover()
    return _current


@contextmanager
def use(registry: Registry) -> Iterator[Registry]:
    """Make ``registry`` the current one for a while."""
    global _current
    before, _current = _current, registry
    try:
        yield registry
    finally:
        _current = before


def unmet(requirement: str) -> str:
    """Why the installed packages don't satisfy ``requirement`` ("is not installed", "is installed as 0.1"), or ""."""
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        wanted = Requirement(requirement)
    except InvalidRequirement as error:
        raise InputError(f"{requirement!r} is no requirement; write one like 'clipgraft-diffusion>=0.1'") from error
    try:
        version = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        return "is not installed"
    return "" if wanted.specifier.contains(version, prereleases=True) else f"is installed as {version}"


def one_line(error: BaseException) -> str:
    """``Type: message`` without line breaks."""
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")


def _distribution(requirement: str) -> str:
    """The normalised distribution name at the start of a requirement."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^A-Za-z0-9._-]", requirement.strip(), maxsplit=1)[0]).lower()


def _names(variable: str, given: Iterable[str] | None) -> set[str] | None:
    if given is None and variable not in os.environ:
        return None
    names = os.environ[variable].split(",") if given is None else given
    return {name.strip() for name in names} - {""}


def _records(hook: str, record: type[R], returned: object) -> list[R]:
    """The records that a hook returned, checked as far as strings can be."""
    if not isinstance(returned, list):
        raise PluginError(f"hook {hook} must return a list of {record.__name__}, got {type(returned).__name__}")
    for item in returned:
        if not isinstance(item, record):
            raise PluginError(f"hook {hook} must return a list of {record.__name__}, got one {type(item).__name__}")
        for target in (item.target, getattr(item, "config", None) or item.target):
            if not re.fullmatch(r"[\w.]+:[\w.]+", target) or not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", item.name):
                raise PluginError(f"{item.name!r} -> {target!r}: expected a lower-case name and 'package.module:name'")
    return returned


def _import_core() -> ModuleType:
    return importlib.import_module("clipgraft.core_plugin")


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


def _scan() -> list[tuple[PluginInfo, Callable[[], ModuleType]]]:
    """The core and every installed entry point of any API major, without importing one."""
    try:
        version = metadata.version("clipgraft")
    except metadata.PackageNotFoundError:
        version = ""
    found: list[tuple[PluginInfo, Callable[[], ModuleType]]] = [
        (PluginInfo("core", "clipgraft", version), _import_core)
    ]
    points = metadata.entry_points()
    everything = [e for g in points.groups if re.fullmatch(r"clipgraft\.v\d+", g) for e in points.select(group=g)]
    ours = {(e.name, e.dist and e.dist.name) for e in everything if e.group == API_GROUP}
    for entry in everything:
        info = PluginInfo(entry.name, entry.dist.name if entry.dist else "", entry.dist.version if entry.dist else "")
        if entry.group != API_GROUP:
            if (entry.name, entry.dist and entry.dist.name) in ours:  # one package may serve several majors
                continue
            info.status = "incompatible"
            info.error = f"made for {entry.group}, this is {API_GROUP}; install a release of it for this clipgraft"
        found.append((info, entry.load))
    return found
