"""Recipe YAML < user YAML (may ``extends: RECIPE[:PRESET]``) < ``a.b=c`` overrides -> a typed, complete config.

Scalars follow YAML 1.2, not PyYAML's 1.1: ``1e-4`` is a float, ``010`` is ten, only true and false are booleans,
``no``, ``yes``, ``on`` and dates stay text, and a key given twice is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from clipgraft.config.describe import coerced, complaint
from clipgraft.config.schema import Node, RunConfig
from clipgraft.errors import InputError, unknown_name
from clipgraft.registry import Registered, Registry

M = TypeVar("M", bound=BaseModel)
Values = dict[str, Any]
LETTERS, VALUES, DEPTH = 500_000, 20_000, 60
"""What a YAML text may hold at most, its aliases written out."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str | None, Any] = {}  # noqa: RUF012 - PyYAML declares it so


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str | None, Any] = {}  # noqa: RUF012 - PyYAML declares it so


for _tag, _pattern in {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    "merge": r"<<",
}.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), None)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    value = int(text, 0) if text[:2] in ("0o", "0x") else int(text) if len(text) < 40 else 2**64
    if abs(value) >= 2**63:
        raise yaml.MarkedYAMLError(problem="a whole number of more than 64 bits", problem_mark=node.start_mark)
    return value


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set[str]()
    for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
        if key.value in seen:
            raise yaml.MarkedYAMLError(problem=f"key {key.value!r:.80} is given twice", problem_mark=key.start_mark)
        seen.add(key.value)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def _represent_list(dumper: _Dumper, values: list[Any]) -> yaml.SequenceNode:
    short = not any(isinstance(value, list | dict) for value in values)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=short)


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    breaks = any(c in text for c in "\x85\u2028\u2029")  # PyYAML writes these unescaped but reads them as line ends
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if breaks else None)


_Dumper.add_representer(list, _represent_list)
_Dumper.add_representer(str, _represent_text)


def _measure(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """How many values a node stands for once its aliases are written out, and how deep; ``YAMLError`` beyond limits.

    Aliases of aliases stand for billions of values in a few lines, and an alias may contain itself.
    """
    if id(node) in known:
        if (found := known[id(node)]) is None:
            raise yaml.MarkedYAMLError(problem="an alias contains itself", problem_mark=node.start_mark)
        return found
    known[id(node)] = None
    inner: list[Any] = node.value if isinstance(node, yaml.CollectionNode) else []
    sizes = [_measure(part, known) for item in inner for part in (item if isinstance(item, tuple) else (item,))]
    size, depth = 1 + sum(size for size, _ in sizes), 1 + max((depth for _, depth in sizes), default=0)
    if size > VALUES or depth > DEPTH:
        raise yaml.MarkedYAMLError(
            problem=f"more than {VALUES} values, or deeper than {DEPTH}", problem_mark=node.start_mark
        )
    known[id(node)] = size, depth
    return size, depth


def parse_yaml(text: str, *, origin: str) -> Any:
    """A YAML document as plain values; ``origin`` names it in errors."""
    if len(text) > LETTERS:
        raise InputError(f"{origin}: {len(text)} letters are more than {LETTERS}; a configuration is smaller")
    loader = None
    try:
        loader = _Loader(text)  # looks for forbidden characters
        if (node := loader.get_single_node()) is None:
            return None
        _measure(node, {})
        return loader.construct_document(node)
    except RecursionError:
        raise InputError(f"{origin}: nested deeper than {DEPTH}; write it flatter") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:  # of PyYAML's explicit tags
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{origin}: a value doesn't fit its type ({reason}); leave !!tags out, shorten it") from None
    except yaml.YAMLError as error:
        mark, parts = (
            getattr(error, "problem_mark", None),
            [getattr(error, "context", ""), getattr(error, "problem", "")],
        )
        place = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise InputError(f"{origin}{place}: {', '.join(filter(None, parts)) or error}") from error
    finally:
        if loader is not None:
            loader.dispose()


def read_yaml(path: Path | Traversable) -> Values:
    """A YAML file that holds a mapping."""
    try:
        values = parse_yaml(path.read_text("utf-8"), origin=path.name)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"can't read {path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from error
    if not isinstance(values, dict | None):
        raise InputError(f"{path.name}: expected 'key: value' lines at the top, got a {type(values).__name__}")
    return values or {}


def dump_yaml(config: BaseModel) -> str:
    """The whole config as YAML that loads back to an equal one."""
    values = config.model_dump(mode="json", by_alias=True)
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def merge(base: Any, over: Any) -> Any:
    """``over`` wins; mappings merge key by key, unless both name a component (``use``) and not the same one."""
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    if base.get("use") != over.get("use") and {"use"} <= base.keys() & over.keys():
        return over
    return {**base, **{key: merge(base.get(key), value) for key, value in over.items()}}


def assign(values: Values, override: str) -> None:
    """Apply ``a.b=c``; the value is YAML, a number in the path is a list index."""
    key, equals, text = override.partition("=")
    if not equals or not all(path := key.strip().split(".")):
        raise InputError(f"--set {override!r:.100}: write KEY=VALUE, such as train.steps=100")
    value = text if text[:1] in tuple("@`%*&!|>") else parse_yaml(text, origin=f"--set {key}")
    at: Any = values
    for depth, part in enumerate(path):
        index: str | int = part
        if isinstance(at, list):
            if not part.isdecimal() or int(part) >= len(at):
                raise InputError(f"--set {key}: {'.'.join(path[:depth])} is a list of {len(at)}, {part!r} is no index")
            index = int(part)
        if depth == len(path) - 1:
            at[index] = value
            return
        inner = at.get(index) if isinstance(at, dict) else at[index]
        if not isinstance(inner, dict | list):
            inner = at[index] = {"use": inner} if isinstance(inner, str) else {}  # a bare name is a node's shorthand
        at = inner


def presets(recipe: Registered, *, registry: Registry) -> dict[str, Traversable]:
    """A recipe's YAML files by preset name; "" is its default."""
    component = recipe.component
    if component.presets is None:
        return {}
    package, *folders = component.presets.split(".")
    files = resources.files(package).joinpath(*folders)
    siblings = [r.component.name for r in registry.list("recipe") if r.component.presets == component.presets]
    found = {}
    for file in sorted(files.iterdir(), key=lambda f: f.name) if files.is_dir() else []:
        stem, suffix = file.name.rpartition(".")[::2]
        owners = [name for name in siblings if stem == name or stem.startswith(f"{name}-")]
        if suffix == "yaml" and owners and max(owners, key=len) == component.name:
            found[stem[len(component.name) + 1 :]] = file
    return found


def _preset(recipe: Registered, preset: str, registry: Registry, seen: tuple[str, ...] = ()) -> Values:
    """The values of a preset with what it extends; {} for a default that no file sets."""
    known = presets(recipe, registry=registry)
    if preset in seen:
        raise InputError(f"preset {preset!r} of {recipe.name} extends itself")
    if preset in known:
        return _extended(read_yaml(known[preset]), recipe, registry, (*seen, preset))
    if preset:
        raise unknown_name(f"{recipe.name} preset", preset, [name for name in known if name])
    return {}


def _extended(values: Values, recipe: Registered, registry: Registry, seen: tuple[str, ...] = ()) -> Values:
    """``values`` over the preset that their ``extends`` names, if any."""
    if "extends" not in values:
        return values
    reference = values.pop("extends")
    name, _, preset = str(reference).partition(":")
    if registry.get("recipe", name).name != recipe.name:
        raise InputError(f"extends: {reference} is not the recipe that runs, {recipe.name}; name one of the two")
    return merge(_preset(recipe, preset, registry, seen), values)  # type: ignore[no-any-return]


def gather(
    reference: str, *, files: Sequence[Path | str] = (), overrides: Sequence[str] = (), registry: Registry
) -> tuple[Registered, Values]:
    """The merged values of ``RECIPE[:PRESET]``, config files and overrides, not yet checked.

    A file's ``extends`` takes the place of the recipe's default. With a preset in ``reference`` it must name the same,
    because otherwise one of the two would be lost silently.
    """
    name, _, preset = reference.partition(":")
    recipe = registry.ready("recipe", name)
    layers = [read_yaml(Path(file)) for file in files]
    bases = {str(layer["extends"]).partition(":")[2] for layer in layers if "extends" in layer}
    if len(bases | ({preset} if preset else set())) > 1:
        raise InputError(f"{reference} and what --config extends are different presets; keep one of them")
    values = {} if bases else _preset(recipe, preset, registry)
    for layer in layers:
        values = merge(values, _extended(layer, recipe, registry))
    for override in overrides:
        assign(values, override)
    return recipe, values


def load_recipe(
    reference: str, *, files: Sequence[Path | str] = (), overrides: Sequence[str] = (), registry: Registry
) -> tuple[Registered, RunConfig]:
    """``gather``, then ``complete``."""
    recipe, values = gather(reference, files=files, overrides=overrides, registry=registry)
    return recipe, complete(recipe, values, registry=registry)


def run_folder(path: Path) -> Path:
    """The run directory that ``path`` is, or whose config.yaml it is."""
    if path.is_file() and path.name != "config.yaml":
        raise InputError(f"{path} is no config.yaml of a run; give a run directory, or RECIPE --config {path}")
    return path.parent if path.is_file() else path


def load_run(folder: Path, *, overrides: Sequence[str] = (), registry: Registry) -> tuple[Registered, RunConfig]:
    """The recipe and config of a run directory."""
    status = folder / "status.json"
    if not status.is_file():
        raise InputError(f"{folder} is no run directory (it has no status.json); give the --out of an earlier run")
    try:
        name = str(json.loads(status.read_text("utf-8"))["recipe"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{status} is damaged; start again with clipgraft run RECIPE --config FILE") from None
    recipe, values = registry.ready("recipe", name), read_yaml(folder / "config.yaml")
    for override in overrides:
        assign(values, override)
    return recipe, complete(recipe, values, registry=registry)


def complete(recipe: Registered, values: Values, *, registry: Registry) -> RunConfig:
    """``values`` as the recipe's config, with every node checked, named in full and filled with its defaults."""
    cls = registry.config_class("recipe", recipe.name) or RunConfig
    config: RunConfig = _resolved(validate(cls, values), registry, "")
    return config


def validate(cls: type[M], values: Mapping[str, Any], *, where: str = "") -> M:
    """``values`` as ``cls``, or one line that says which key is wrong, what it was, and what is expected."""
    try:
        config = cls.model_validate(dict(values))
    except ValidationError as error:
        raise InputError(complaint(cls, error, where=where)) from error
    if problem := coerced(values, config, where=where):
        raise InputError(problem)
    return config


def _resolved(value: Any, registry: Registry, where: str) -> Any:
    """``value`` with every node checked by its component's config class and completed with its defaults."""
    if isinstance(value, Node):
        try:
            registered = registry.ready(value.kind, value.use)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        cls, settings = registry.config_class(value.kind, registered.name), value.settings
        if cls is None and settings:
            raise InputError(f"{where}: {registered.name} has no settings, got {', '.join(settings)}; leave them out")
        if cls is not None:
            settings = validate(cls, settings, where=where).model_dump(mode="json", by_alias=True)
        declared = {name: getattr(value, name) for name in type(value).model_fields}
        return type(value).model_validate({**settings, **declared, "use": registered.name})
    prefix = f"{where}." if where else ""
    if isinstance(value, BaseModel):
        keys = {name: f.alias or name for name, f in type(value).model_fields.items()}
        return value.model_copy(
            update={name: _resolved(getattr(value, name), registry, prefix + key) for name, key in keys.items()}
        )
    if isinstance(value, tuple | list):
        return type(value)(_resolved(v, registry, f"{prefix}{i}") for i, v in enumerate(value))
    if isinstance(value, dict):
        return {k: _resolved(v, registry, f"{prefix}{k}") for k, v in value.items()}
    return value
