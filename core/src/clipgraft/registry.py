"""The registry: which plugins are in use, what they offer, and names turned into objects on first use."""

from __future__ import annotations

import builtins
import importlib
import importlib.metadata as metadata
import os
import re
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from clipgraft import hookspecs
from clipgraft.errors import ClipgraftError, InputError, PluginError, unknown_name
from clipgraft.manifests import FILE, HookManager, Load, PluginInfo, Registered, one_line, read, scan
from clipgraft.spec import KINDS, CommandSpec, Kind

if TYPE_CHECKING:
    from pydantic import BaseModel

    from clipgraft.encoders.base import Encoder

__all__ = ["PluginInfo", "Registered", "Registry", "current", "unmet", "use"]

COMMANDS_OF = {
    "evaluation": ("demo", "compare", "report", "claims"),
    "embedding": ("embed", "search", "classify"),
    "data": ("data",),
}
"""Commands that the core leaves to plugins of the project, so that it stays small; others offer their own group."""

KNOWN_PLUGINS = {
    "anomaly": "anomalyclip genclip winclip clipn mvtec visa parts parts-table onnx clipn-ood inspection",
    "diffusion": "diva genhancer genhancer-discrete un2clip sds-clip",
    "data": "wds hf table karpathy coco mix",
    "embedding": "onnx-towers",
    "evaluation": "mmvp aro sugarcrepe winoground knn clustering calibration out-of-distribution corruption geometry "
    "hard-negatives pairs-grid",
    "llm": "llm2clip caption-contrast long-clip negclip count-to-ten clip-refine tinyclip reinforce captions docci "
    "sharegpt4v urban1k caption-retrieval long-retrieval",
    "merging": "soup wise-ft ties opcm sam-clip agglomerate radio clip-moe ewa segmentation zero-shot-seg continual "
    "ingredients kept-masks masked-zero-shot-seg prompted-masks word-segments",
    "toyworld": "images pairs defects videos digits photos clip clip-1 clip-2 retention crowds",
    "video": "vifi-clip x-clip ez-clip froster tempme video msrvtt dist ila m2-clip prompt-switch vifi-clip-prompts "
    "classification classifier cost order text-retrieval",
}
"""Plugins of the project and the names people look for, only to say what to install."""


class Registry:
    """The plugins of this process and what they offer."""

    def __init__(self) -> None:
        self.plugins: list[PluginInfo] = []
        self._manager = HookManager("clipgraft", hookspecs, ("clipgraft_",))
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
        registry, found = cls(), scan([Path(file) for file in files])
        for index, (info, load) in enumerate(found):
            rivals = [i for i, _ in found if i.name == info.name and i is not info and i.status != "incompatible"]
            unwanted = info.name in disabled or (allowed is not None and info.name not in allowed)
            if unwanted and index > 0 and info.distribution != FILE:
                info.status = "disabled"
            elif info.status == "ok" and rivals and index > 0:
                info.status = "duplicate"
                info.error = f"also offered by {', '.join(r.distribution for r in rivals)}; uninstall one of them"
            registry._add(info, load)
            if info.status not in ("ok", "disabled"):
                line = f"plugin {info.name} is {info.status}: {info.error}"
                if strict:
                    raise PluginError(line)
                print(f"clipgraft: {line} (see: clipgraft plugins doctor)", file=sys.stderr)
        for name in sorted((allowed or set()) - {info.name for info, _ in found}):
            print(f"clipgraft: CLIPGRAFT_PLUGINS names {name!r}, which is not installed", file=sys.stderr)
        return registry

    def _add(self, info: PluginInfo, load: Load) -> None:
        """Take up one plugin's records; a failure marks it broken and leaves nothing of it behind."""
        self.plugins.append(info)
        if info.status != "ok":
            return
        start = time.perf_counter()
        try:
            with redirect_stdout(sys.stderr):  # a manifest that prints must not spoil --json
                components, commands = read(self._manager, info, load)
            names, own = [c.name for c in commands], (info.name, *COMMANDS_OF.get(info.name, ()))
            if info.name != "core" and any(names.count(name) > 1 or name not in own for name in names):
                raise PluginError(f"may offer one command group, named {info.name!r} like itself")
            left = {name for plugin, given in COMMANDS_OF.items() if plugin != info.name for name in given}
            if taken := {*left, *(c.name for c in self._commands)} & set(names):
                raise PluginError(f"command {min(taken)!r} belongs to the core; rename the plugin")
            self._components |= {(r.kind, r.name): r for r in components}
            self._commands += commands
            info.components = sorted({r.name for r in components})
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a manifest that calls sys.exit must not end the tool either
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
        known = {r.name if "/" in name else r.component.name for r in everything}
        raise unknown_name(kind, name, known, hint=self.hint(name))

    def hint(self, name: str) -> str:
        """What to do when ``name`` belongs to a plugin that is not in use."""
        plugin, _, bare = name.rpartition("/")
        plugin = plugin or next((p for p, names in KNOWN_PLUGINS.items() if bare in names.split()), "")
        status = next((info.status for info in self.plugins if info.name == plugin), None)
        if status is None:
            return f"It comes with a package: pip install clipgraft-{plugin}" if plugin in KNOWN_PLUGINS else ""
        return "" if status == "ok" else f"Plugin {plugin} is {status}: clipgraft plugins doctor {plugin}"

    def hint_command(self, name: str) -> str:
        """What to do for a command that a plugin of the project brings and none in use has."""
        owner = next((plugin for plugin, names in COMMANDS_OF.items() if name in (plugin, *names)), name)
        return self.hint(f"{owner}/{name}")

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

    def ready(self, kind: Kind, name: str) -> Registered:
        """As ``get``, with what the component needs installed."""
        registered = self.get(kind, name)
        for requirement in registered.component.needs:
            if problem := unmet(requirement):
                raise PluginError(
                    f"{registered.name} needs {requirement}, which {problem}: pip install '{requirement}'"
                )
        return registered

    def config_class(self, kind: Kind, name: str) -> type[BaseModel] | None:
        """The pydantic model of a component's settings; None when it has none."""
        config = self.get(kind, name).component.config
        return None if config is None else self.resolve(config)

    def build(self, kind: Kind, name: str, settings: Mapping[str, Any]) -> Any:
        """Check ``settings`` and call the target with the config's fields (a recipe: with the config itself).

        The target of a claim, a suite, an exporter or a report is returned as it is.
        """
        from clipgraft.config.load import validate

        registered = self.ready(kind, name)
        target, cls = self.resolve(registered.component.target), self.config_class(kind, registered.name)
        if cls is None and settings:
            raise InputError(f"{registered.name} has no settings, got {', '.join(settings)}; leave them out")
        if cls is None:
            return target if kind in ("claim", "suite", "exporter", "report") else target()
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
                encoder: Any = impl.function(*[uri for _ in impl.argnames])
            except ClipgraftError:
                raise
            except Exception as error:
                failed = PluginError(f"plugin {impl.plugin_name} failed to open {uri!r}: {one_line(error)}")
                failed.__cause__ = error
                continue
            if encoder is not None:
                return cast("Encoder", encoder)
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

    def freeze(self) -> builtins.list[dict[str, str]]:
        """Name, distribution and version of the plugins in use."""
        used = [info for info in self.plugins if info.status == "ok"]
        return [{"name": i.name, "distribution": i.distribution, "version": i.version} for i in used]


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


def _distribution(requirement: str) -> str:
    """The normalised distribution name at the start of a requirement."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^A-Za-z0-9._-]", requirement.strip(), maxsplit=1)[0]).lower()


def _names(variable: str, given: Iterable[str] | None) -> set[str] | None:
    if given is None and variable not in os.environ:
        return None
    names = os.environ[variable].split(",") if given is None else given
    return {name.strip() for name in names} - {""}
