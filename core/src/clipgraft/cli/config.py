"""``clipgraft config``: what a run would use, what can be set, what differs."""

from __future__ import annotations

import json as jsonlib
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from clipgraft.cli.output import JsonFlag, SetOption, emit, table
from clipgraft.errors import InputError
from clipgraft.registry import current

app = typer.Typer(name="config", no_args_is_help=True, help="Show, describe or compare run configurations.")
UNSET = "(not set)"
Recipe = Annotated[str, typer.Argument(metavar="RECIPE[:PRESET]")]


@app.command()
def show(
    recipe: Recipe,
    config: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="YAML over the recipe's; repeatable.")
    ] = None,
    set_: SetOption = None,
    json: JsonFlag = False,
) -> None:
    """Print the complete configuration of a run."""
    from clipgraft.config.load import dump_yaml, load_recipe

    _, loaded = load_recipe(recipe, files=config or (), overrides=set_ or (), registry=current())
    emit(loaded.model_dump(mode="json", by_alias=True)) if json else print(dump_yaml(loaded), end="")


@app.command()
def schema(recipe: Annotated[str, typer.Argument(metavar="RECIPE")], json: JsonFlag = False) -> None:
    """Print every key of a recipe with type, default, unit and meaning; --json prints a JSON Schema for editors."""
    from clipgraft.cli.plugins import settings_rows

    cls = current().config_class("recipe", recipe.partition(":")[0])
    if cls is None:
        raise InputError(f"{recipe} has no settings")
    if json:
        emit(cls.model_json_schema(by_alias=True))
    else:
        table(settings_rows(cls), ["key", "type", "default", "unit", "description"])


@app.command()
def diff(a: str, b: str, json: JsonFlag = False) -> None:
    """Compare two of: YAML file, run directory, RECIPE[:PRESET]."""
    left, right = _flat(a), _flat(b)
    keys = [k for k in {**left, **right} if left.get(k, UNSET) != right.get(k, UNSET)]
    if json:
        emit({k: [left.get(k), right.get(k)] for k in keys})
        return
    table([{"key": k, a: left.get(k, UNSET), b: right.get(k, UNSET)} for k in keys], ["key", a, b])


def _flat(reference: str) -> dict[str, Any]:
    """The settings of a file, run or recipe by dotted key, completed by the recipe's defaults where it is known."""
    from clipgraft.config.describe import describe
    from clipgraft.config.load import assign, complete, gather, merge, read_yaml
    from clipgraft.config.schema import RunConfig

    path, registry = Path(reference), current()
    path = path / "config.yaml" if path.is_dir() else path
    values = read_yaml(path) if path.is_file() else {"extends": reference}
    if "extends" in values:
        name = str(values["extends"])
        recipe, values = gather(name, files=[path] if path.is_file() else [], registry=registry)
        open_keys: dict[str, Any] = {}
        for row in describe(registry.config_class("recipe", recipe.name) or RunConfig):
            if row.required and row.type == "text":
                assign(open_keys, f"{row.key}={UNSET}")
        values = merge(open_keys, values)
        with suppress(InputError):  # a number is still open: compare what is set
            values = complete(recipe, values, registry=registry).model_dump(mode="json", by_alias=True)
    flat: dict[str, Any] = {}

    def walk(value: Any, prefix: str) -> None:
        if isinstance(value, dict):
            for k, v in value.items():
                walk(v, f"{prefix}.{k}".lstrip("."))
        else:
            flat[prefix] = jsonlib.dumps(value) if isinstance(value, list) else value

    walk(values, "")
    return flat
