"""Config models for people: their keys as rows, and validation errors as one line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError

from clipgraft.config.schema import Node


@dataclass(frozen=True, slots=True)
class Row:
    """One key: dotted path, type in words, default as JSON types (None where ``required``), unit, description."""

    key: str
    type: str
    default: Any
    required: bool
    unit: str
    description: str


def describe(cls: type[BaseModel]) -> list[Row]:
    """Every key of a config model, nested ones by dotted path."""
    return list(_rows(cls, "", None))


def _rows(cls: type[BaseModel], prefix: str, values: BaseModel | None) -> Iterator[Row]:
    for name, info in cls.model_fields.items():
        key, inner = f"{prefix}{info.alias or name}", _bare(info.annotation)
        required = info.is_required() and values is None
        default = None if required else getattr(values, name) if values else info.get_default(call_default_factory=True)
        if _is_model(inner) and not issubclass(inner, Node):
            if default is None and not required:
                yield Row(key, "settings | null", None, False, "", info.description or "")
            yield from _rows(inner, f"{key}.", default if isinstance(default, BaseModel) else None)
            continue
        text, unit = re.fullmatch(r"(.*?)\s*(?:\[([^]]+)\])?", info.description or "", re.DOTALL).groups()  # type: ignore[union-attr]
        shown = TypeAdapter(Any).dump_python(default, mode="json")
        yield Row(key, type_name(info.annotation), shown, required, unit or "", text)


def type_name(annotation: Any) -> str:
    """A type in words: ``number``, ``list of graft``, ``"adamw" | "sgd"``."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_name(args[0])
    if origin is Literal:
        return " | ".join(f'"{a}"' if isinstance(a, str) else str(a) for a in args)
    if origin in (Union, UnionType):
        return " | ".join(type_name(a) for a in args)
    if origin in (list, tuple, set, frozenset):
        many = origin is not tuple or args[-1] is Ellipsis
        return f"list of {type_name(args[0])}" if many else f"[{', '.join(map(type_name, args))}]"
    if origin is dict:
        return f"mapping of {type_name(args[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Node):
        return annotation.kind
    names: dict[Any, str] = {int: "integer", float: "number", str: "text", bool: "true | false", NoneType: "null"}
    return names.get(annotation) or str(getattr(annotation, "__name__", annotation))


def complaint(cls: type[BaseModel], error: ValidationError, *, where: str = "") -> str:
    """One line: which keys are wrong, what they were and what is expected; then which are missing."""
    missing: dict[str, str] = {}
    wrong = [line for item in error.errors(include_url=False) if (line := _problem(cls, item, where, missing))]
    wrong.sort(key=lambda line: not line.startswith("unknown key"))
    lines = wrong[:3] + ([f"and {len(wrong) - 3} more"] if len(wrong) > 3 else [])
    if len(missing) == 1:
        name, text = missing.popitem()
        how = f"--set {name}=VALUE or in a config file"
        if "/" in where:  # of a component
            how = f"{where}?{name.removeprefix(f'{where}.')}=VALUE, or beside its name in a config file"
        lines.append(f"{name} is not set; give it with {how}{text and f' ({text})'}")
    elif missing:
        lines.append(f"not set: {', '.join(missing)}; give each with --set KEY=VALUE or in a config file")
    return "; ".join(lines)


def _problem(cls: type[BaseModel], item: Any, where: str, missing: dict[str, str]) -> str:
    """One pydantic error as a line; missing keys go to ``missing``, a missing block as the keys that it requires."""
    path, siblings, about = [where] if where else [], list[str](), ""
    annotation: Any = cls
    for part in item["loc"]:
        model = _bare(annotation) if _is_model(annotation) else None
        fields = {k: f for name, f in model.model_fields.items() for k in (name, f.alias)} if model else {}
        siblings = [f.alias or name for name, f in model.model_fields.items()] if model else []
        if part in fields:
            annotation, about = fields[part].annotation, fields[part].description or ""
        elif isinstance(part, int):
            annotation = next(iter(get_args(_bare(annotation))), None)
        elif item["type"] != "extra_forbidden" or part != item["loc"][-1]:
            continue  # pydantic's name for a member of a union, not a key
        path.append(str(part))
    key = ".".join(path)
    if item["type"] == "extra_forbidden":
        matches = difflib.get_close_matches(path[-1], siblings, n=2, cutoff=0.5)
        close = [".".join([*path[:-1], name]) for name in matches]
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(siblings)}"
        return f"unknown key {key}; {hint}"
    if item["type"] == "missing":
        rows = _rows(_bare(annotation), f"{key}.", None) if _is_model(annotation) else ()
        missing |= {row.key: row.description for row in rows if row.required} or {key: about}
        return ""
    if item["type"] in ("value_error", "assertion_error"):
        return f"{key}: {item['msg'].partition(', ')[2]}".removeprefix(": ")
    plain = {
        "model_type": "be a mapping",
        "tuple_type": "be a list",
        "list_type": "be a list",
        "invalid_key": "have texts as keys",
    }
    wanted = plain.get(item["type"], item["msg"].removeprefix("Input should "))
    return f"{key or 'the config'} must {wanted.partition(', unable to')[0]}, got {item['input']!r:.60}"


def coerced(given: Any, typed: Any, *, where: str = "") -> str:
    """The first value that pydantic made a number or true/false out of something else, as one line; "" when none."""
    if isinstance(typed, BaseModel) and isinstance(given, Mapping):
        names = {f.alias or name: name for name, f in type(typed).model_fields.items()}
        pairs = [(str(k), v, getattr(typed, names.get(k, str(k)), None)) for k, v in given.items()]
    elif isinstance(typed, list | tuple) and isinstance(given, list | tuple):
        pairs = [(str(i), v, t) for i, (v, t) in enumerate(zip(given, typed, strict=False))]
    elif isinstance(typed, int | float) and (
        isinstance(given, str) or isinstance(given, bool) != isinstance(typed, bool)
    ):
        return f"{where}: expected {type_name(type(typed))}, got {given!r}"
    else:
        return ""
    return next(filter(None, (coerced(v, t, where=f"{where}.{k}".lstrip(".")) for k, v, t in pairs)), "")


def _bare(annotation: Any) -> Any:
    """``X`` of ``Annotated[X, ...]`` and of ``X | None``."""
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        members = [a for a in get_args(annotation) if a is not NoneType]
        return _bare(members[0]) if len(members) == 1 else annotation
    return annotation


def _is_model(annotation: Any) -> bool:
    bare = _bare(annotation)
    return isinstance(bare, type) and issubclass(bare, BaseModel)
