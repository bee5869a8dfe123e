"""Conformance of what a plugin declares: manifest, targets, configs, presets, help, imports. Nothing is trained."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from clipgraft.errors import ClipgraftError, InputError
from clipgraft.manifests import Registered, one_line
from clipgraft.registry import Registry, unmet
from clipgraft.testing.subject import NotApplicable, Subject, Violation, other_packages

if TYPE_CHECKING:
    from pydantic import BaseModel

UNKNOWN = "no_such_setting"

BLOCKED = """
import json, sys
from clipgraft import hookspecs
from clipgraft.manifests import HookManager, one_line, read, scan
from pathlib import Path

class Block:
    asked = []
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or top in allowed:
            return None
        self.asked.append(name)
        raise ImportError(f"{name} is blocked")

name, files, allowed = json.loads(sys.argv[1])
info, load = next(pair for pair in scan(map(Path, files)) if pair[0].name == name)
sys.meta_path.insert(0, Block())
problem = ""
try:
    read(HookManager("clipgraft", hookspecs, ("clipgraft_",)), info, load)
except BaseException as error:
    problem = one_line(error)
print(json.dumps({"problem": problem, "asked": Block.asked}))
"""

HEAVY = ("torch", "numpy", "transformers", "open_clip", "accelerate", "PIL", "diffusers", "pandas", "scipy", "sklearn")
HELP = """
import json, sys
from clipgraft.cli import main
try:
    main(json.loads(sys.argv[1]))
finally:
    print("heavy:", *[name for name in json.loads(sys.argv[2]) if name in sys.modules], file=sys.stderr)
"""


def manifest_is_light(subject: Subject) -> None:
    """The manifest and its hooks run where nothing but the standard library, pluggy and ``clipgraft`` is there."""
    allowed = ["clipgraft", "pluggy", "packaging", subject.package()]
    found = json.loads(_python(BLOCKED, json.dumps([subject.name, [str(f) for f in subject.files], allowed])).stdout)
    if asked := found["asked"]:
        raise Violation(f"the manifest imports {asked[0]}; import it in the module that a target names")
    if found["problem"]:
        raise Violation(f"the manifest fails: {found['problem']}")


def targets_resolve(subject: Subject, registry: Registry) -> list[str]:
    """Import every target and config; returns a note per component that was left out for a missing requirement."""
    from pydantic import BaseModel

    from clipgraft.claims import Claim

    offers, commands = subject.offers(registry), subject.commands(registry)
    if not offers and not commands:
        raise NotApplicable(f"{subject.name} offers no component and no command")
    notes = []
    for r in offers:
        if missing := [n for n in r.component.needs if unmet(n)]:
            notes.append(f"{r.name} needs {missing[0]}, which {unmet(missing[0])}")
            continue
        target = _resolved(registry, r.component.target, r)
        config = _resolved(registry, r.component.config, r) if r.component.config else None
        if config is not None and not (isinstance(config, type) and issubclass(config, BaseModel)):
            raise Violation(f"{r.kind} {r.name}: config {r.component.config} is no pydantic model")
        if r.kind == "claim" and not isinstance(target, Claim):
            raise Violation(f"claim {r.name}: {r.component.target} is a {type(target).__name__}, not a Claim")
        if r.kind != "claim" and not callable(target):
            raise Violation(f"{r.kind} {r.name}: {r.component.target} can't be called")
        if r.kind == "recipe":
            _is_a_recipe(registry, r, target)
        elif r.kind == "claim":
            notes += _arms_load(registry, target)
    for command in commands:
        if not callable(found := _resolved(registry, command.target, f"command {command.name}")):
            raise Violation(f"command {command.name}: {command.target} is a {type(found).__name__}, not a Typer app")
    return notes


def _resolved(registry: Registry, target: str, owner: Registered | str) -> Any:
    try:
        return registry.resolve(target)
    except ClipgraftError as error:
        name = owner if isinstance(owner, str) else f"{owner.kind} {owner.name}"
        raise Violation(f"{name}: {one_line(error)}") from error


def _is_a_recipe(registry: Registry, r: Registered, target: Any) -> None:
    """A recipe has plan and check, and a folder of presets that holds its files."""
    from clipgraft.config.load import presets

    missing = [name for name in ("plan", "check") if not callable(getattr(target, name, None))]
    if missing and isinstance(target, type):  # what a function returns shows when it runs
        raise Violation(f"recipe {r.name}: {r.component.target} has no {' and no '.join(missing)}")
    siblings = [s for s in registry.list("recipe") if s.component.presets == r.component.presets]
    if r.component.presets is not None and not any(presets(s, registry=registry) for s in siblings):
        raise Violation(f"recipe {r.name}: no {r.component.name}*.yaml in {r.component.presets}; is it packaged?")


def _arms_load(registry: Registry, claim: Any) -> list[str]:
    """The arms of a claim name recipes and settings that exist, on every base; notes for plugins that are missing."""
    from clipgraft.config.load import load_recipe

    for arm in claim.arms:
        try:
            load_recipe(arm.recipe, overrides=[f"model.from={claim.bases[0]}", *arm.overrides], registry=registry)
        except ClipgraftError as error:
            if _of_a_missing_plugin(error):
                return [f"claim {claim.name}, arm {arm.name}: {one_line(error)}"]
            raise Violation(f"claim {claim.name}, arm {arm.name}: {one_line(error)}") from error
    return []


def configs_are_strict(subject: Subject, registry: Registry) -> None:
    """Every default is a valid value, and a key that isn't there is refused, in every block of every config."""
    checked = False
    for r, cls in _configs(subject, registry):
        checked = True
        for block, model in _models(cls):
            where = f"{r.kind} {r.name}: {model.__name__}" + (f" at {block}" if block else "")
            _refuses_unknown_keys(model, where)
            _defaults_are_valid(model, where)
    if not checked:
        raise NotApplicable(f"no component of {subject.name} has a config")


def _configs(subject: Subject, registry: Registry) -> Iterator[tuple[Registered, type[BaseModel]]]:
    for r in subject.offers(registry):
        if r.component.config and not any(map(unmet, r.component.needs)):
            yield r, _resolved(registry, r.component.config, r)


def _models(cls: type[BaseModel], path: str = "", seen: tuple[type, ...] = ()) -> Iterator[tuple[str, type[BaseModel]]]:
    """The config and its blocks with their dotted paths; nodes are checked with what they name."""
    from pydantic import BaseModel

    from clipgraft.config.schema import Node

    yield path, cls
    for name, info in cls.model_fields.items():
        for inner in _classes(info.annotation):
            if issubclass(inner, BaseModel) and not issubclass(inner, Node) and inner not in seen:
                yield from _models(inner, f"{path}.{info.alias or name}".lstrip("."), (*seen, inner))


def _classes(annotation: Any) -> Iterator[type]:
    """The classes that an annotation mentions."""
    from typing import get_args

    if isinstance(annotation, type) and not get_args(annotation):
        yield annotation
    for inner in get_args(annotation):
        yield from _classes(inner)


def _refuses_unknown_keys(model: type[BaseModel], where: str) -> None:
    from pydantic import ValidationError

    try:
        model.model_validate({UNKNOWN: 1})
    except ValidationError as error:
        if any(e["type"] == "extra_forbidden" and e["loc"][-1] == UNKNOWN for e in error.errors(include_url=False)):
            return
        if model.model_config.get("extra") == "forbid":  # a check of the whole came first
            return
    raise Violation(f"{where} accepts a key that it doesn't know; derive it from clipgraft.config.schema.Config")


def _defaults_are_valid(model: type[BaseModel], where: str) -> None:
    """Pydantic takes defaults as they stand, so each is checked here against its own annotation and bounds."""
    from typing import Annotated

    from pydantic import TypeAdapter, ValidationError

    for name, info in model.model_fields.items():
        if info.is_required():
            continue
        default: Any = info.get_default(call_default_factory=True, validated_data={})
        try:
            annotation: Any = Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation
            TypeAdapter[Any](annotation).validate_python(default)
        except ValidationError as error:
            found = error.errors(include_url=False)[0]
            raise Violation(f"{where}: the default {default!r} of {name} is refused: {found['msg']}") from error


def presets_survive_yaml(subject: Subject, registry: Registry) -> list[str]:
    """Every preset loads, and written as YAML it loads back to an equal config; notes where a plugin is missing."""
    from clipgraft.config.load import complete, dump_yaml, parse_yaml, presets, validate

    notes, checked = list[str](), False
    for r, cls in _configs(subject, registry):
        if r.kind == "recipe":
            for preset in presets(r, registry=registry):
                name = f"{r.name}:{preset}".rstrip(":")
                try:
                    config = _loaded(registry, r, cls, preset)
                    if config is None:
                        notes.append(f"preset {name} needs settings that only a user knows")
                        continue
                    again = complete(r, parse_yaml(dump_yaml(config), origin=name), registry=registry)
                except ClipgraftError as error:
                    if not _of_a_missing_plugin(error) and (preset or not _asks(error)):
                        raise Violation(f"preset {name}: {one_line(error)}") from error
                    notes.append(f"preset {name}: {one_line(error)}")
                    continue
                checked = True
                _equal(config, again, f"preset {name}")
        elif not any(info.is_required() for info in cls.model_fields.values()):
            own = _defaults(cls, f"{r.kind} {r.name}")
            if own is None:
                notes.append(f"{r.kind} {r.name} needs settings that only a user knows")
                continue
            checked = True
            text = dump_yaml(own)
            try:
                _equal(own, validate(cls, parse_yaml(text, origin=r.name) or {}), f"{r.kind} {r.name}")
            except InputError as error:
                raise Violation(f"{r.kind} {r.name}: its defaults as YAML are refused: {error}") from error
    if not checked:
        raise NotApplicable(notes[0] if notes else f"no config of {subject.name} is complete without values of yours")
    return notes


def _defaults(cls: type[BaseModel], where: str) -> BaseModel | None:
    """The config without any setting; None when a check of the whole asks for one of several."""
    from pydantic import ValidationError

    try:
        return cls()
    except ValidationError as error:
        if all(not e["loc"] for e in error.errors(include_url=False)):
            return None
        raise Violation(f"{where}: its defaults are refused: {error.errors(include_url=False)[0]['msg']}") from error


def _loaded(registry: Registry, r: Registered, cls: type[BaseModel], preset: str) -> BaseModel | None:
    """A preset with what it leaves to the user filled in: a text that names nothing, the number one.

    None when it leaves something else open.
    """
    from clipgraft.config.describe import describe
    from clipgraft.config.load import assign, complete, gather, merge

    given: dict[str, Any] = {}
    _, values = gather(f"{r.name}:{preset}".rstrip(":"), registry=registry)
    for row in describe(cls):
        if row.required and row.type in ("text", "number", "integer"):
            assign(given, f"{row.key}={'unset' if row.type == 'text' else '1'}")
        elif row.required and not _given(values, row.key):
            return None
    return complete(r, merge(given, values), registry=registry)


def _given(values: Any, key: str) -> bool:
    """Whether plain values hold a dotted key."""
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return True


def _equal(a: BaseModel, b: BaseModel, where: str) -> None:
    left, right = a.model_dump(mode="json", by_alias=True), b.model_dump(mode="json", by_alias=True)
    if differing := [key for key in left if left[key] != right.get(key)]:
        key = differing[0]
        raise Violation(f"{where} changes on its way through YAML: {key} was {left[key]!r}, became {right.get(key)!r}")


def _asks(error: Exception) -> bool:
    """Whether only checks of a whole config failed, such as one that asks the user for a score to choose by."""
    from pydantic import ValidationError

    cause = error.__cause__
    return isinstance(cause, ValidationError) and all(e["type"] == "value_error" for e in cause.errors())


def _of_a_missing_plugin(error: Exception) -> bool:
    """Whether the registry says which package to install."""
    return "pip install" in str(error)


def help_lists_the_command(subject: Subject, registry: Registry) -> None:
    """The root help lists the plugin's group, the group its commands, each with a line, and no help imports torch."""
    import typer

    commands = subject.commands(registry)
    if not commands:
        if importlib.util.find_spec(f"{subject.package()}.commands") if not subject.files else None:
            raise Violation(
                f"{subject.package()}.commands is offered by no hook, so no help lists it; return a CommandSpec named "
                f"{subject.name!r} from clipgraft_commands"
            )
        raise NotApplicable(f"{subject.name} offers no command")
    plugin = [part for file in subject.files for part in ("--plugin", str(file))]
    for command in commands:
        if not command.help.strip():
            raise Violation(f"command {command.name}: its CommandSpec has no help")
        _listed(command.name, _help([*plugin], heavy=HEAVY), "clipgraft --help")
        text = _help([*plugin, command.name], heavy=HEAVY)
        target = registry.resolve(command.target)
        for name, inner in _subcommands(target).items() if isinstance(target, typer.Typer) else ():
            where = f"clipgraft {command.name}"
            _listed(name, text, f"{where} --help")
            if not (inner.help or inner.short_help):
                raise Violation(f"{where} {name} says nothing in its help; give the function a docstring")


def _subcommands(app: Any) -> dict[str, Any]:
    """The commands of a group, as the command line would find them; a group of one command is that command."""
    import typer

    command = typer.main.get_command(app)
    return dict(getattr(command, "commands", {}))


def _listed(name: str, text: str, where: str) -> None:
    if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text.partition("Commands")[2]):
        raise Violation(f"{where} does not list {name}; is it hidden, or registered under another name?")


def _help(words: list[str], *, heavy: tuple[str, ...]) -> str:
    """What a help page prints, from a process of its own; raises when it fails or imports what is heavy."""
    shown = " ".join(["clipgraft", *words, "--help"])
    done = _python(HELP, json.dumps([*words, "--help"]), json.dumps(heavy))
    *lines, last = done.stderr.strip().splitlines() or [""]
    if done.returncode or not last.startswith("heavy:"):
        raise Violation(f"{shown} exits with {done.returncode}: {(lines or [last])[-1]}")
    if imported := last.split()[1:]:
        raise Violation(f"{shown} imports {imported[0]}; import it inside the functions of the command's module")
    return done.stdout


def imports_no_other_plugin(subject: Subject) -> None:
    """No file of the plugin imports the package of another plugin, in whatever way it says so."""
    others = other_packages(subject)
    sources = subject.sources()
    if not sources:
        raise Violation(f"no Python file of {subject.package()} was found; is the plugin installed?")
    for path in sources:
        for line, module in _imports(ast.parse(path.read_text("utf-8"), str(path))):
            top = module.partition(".")[0]
            foreign = top.startswith("clipgraft_") and top != subject.package()
            if top in others or foreign:
                raise Violation(
                    f"{path.name} line {line} imports {module}, another plugin's; use what it registers, by name, "
                    "through the registry"
                )


def _imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and module of every import statement, and of every call with a module's name as text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__", "resolve") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value.partition(":")[0]


def _python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``code`` in a fresh interpreter that finds what this one finds."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "COLUMNS": "200"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
