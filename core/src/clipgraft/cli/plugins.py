"""``clipgraft plugins``, ``clipgraft list`` and ``clipgraft show``: what is installed and what it offers."""

from __future__ import annotations

import dataclasses
import traceback
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipgraft.cli.output import JsonFlag, emit, table
from clipgraft.errors import PluginError, unknown_name
from clipgraft.manifests import FILE, PLURALS, PluginInfo, Registered, one_line
from clipgraft.registry import current, unmet

if TYPE_CHECKING:
    from pydantic import BaseModel

app = typer.Typer(name="plugins", no_args_is_help=True, help="List, show and diagnose plugins.")
COLUMNS = ["name", "distribution", "version", "status", "components", "load_ms", "path", "error"]


def list_components(
    what: Annotated[str, typer.Argument(help=f"{', '.join(PLURALS)}.", metavar="WHAT")], json: JsonFlag = False
) -> None:
    """List everything of one kind."""
    if what not in PLURALS:
        raise unknown_name("kind", what, PLURALS)
    rows = [_about(r) for r in current().list(PLURALS[what])]
    emit(rows) if json else table(rows, ["name", "summary"])


def show(name: Annotated[str, typer.Argument(metavar="NAME")], json: JsonFlag = False) -> None:
    """Show everything called NAME: summary, paper, settings, presets."""
    from clipgraft.config.load import presets

    registry = current()
    everything = [r for kind in PLURALS.values() for r in registry.list(kind)]
    found = [r for r in everything if name in (r.name, r.component.name)]
    if not found:
        raise unknown_name("name", name, {r.name for r in everything}, hint=registry.hint(name))
    rows = []
    for r in found:
        row = _about(r) | {"config": [], "presets": [p for p in presets(r, registry=registry) if p]}
        try:
            cls = registry.config_class(r.kind, r.name)
            row["config"] = settings_rows(cls) if cls else []
        except PluginError as error:  # what it needs may be missing; the rest is still worth showing
            row["problem"] = str(error)
        rows.append(row)
    if json:
        emit(rows)
        return
    for row in rows:
        print(f"{row['name']} ({row['kind']}): {row['summary']}")
        for label in ("paper", "needs", "presets", "problem"):
            if value := row.get(label):
                print(f"{label}: {', '.join(value) if isinstance(value, list) else value}")
        if row["config"]:
            table(row["config"], ["key", "type", "default", "unit", "description"])


def _about(r: Registered) -> dict[str, Any]:
    c = r.component
    about = {"name": r.name, "kind": r.kind, "plugin": r.plugin, "summary": c.summary, "paper": c.paper}
    return about | {"needs": list(c.needs)}


def settings_rows(cls: type[BaseModel]) -> list[dict[str, Any]]:
    """Every key of a config model as a row of plain values."""
    from clipgraft.config.describe import describe

    return [dataclasses.asdict(row) | {"default": "required" if row.required else row.default} for row in describe(cls)]


@app.command("list")
def list_plugins(json: JsonFlag = False) -> None:
    """Every plugin with its status."""
    rows = [{column: getattr(info, column) for column in COLUMNS} for info in current().plugins]
    if json:
        emit(rows)
    else:
        table([row | {"components": len(row["components"])} for row in rows], COLUMNS)


@app.command("show")
def show_plugin(name: str, json: JsonFlag = False) -> None:
    """One plugin and what it offers."""
    info = _plugins(name)[0]
    offers = [_about(r) for r in _offers(info)]
    if json:
        emit({column: getattr(info, column) for column in COLUMNS} | {"components": offers})
        return
    for column in COLUMNS:
        if column != "components" and getattr(info, column) != "":
            print(f"{column}: {getattr(info, column)}")
    table(offers, ["kind", "name", "summary"])


@app.command()
def doctor(name: Annotated[str | None, typer.Argument()] = None) -> None:
    """Import everything that plugins offer and print what fails; exit 1 when something is broken."""
    broken = False
    for info in _plugins(name):
        failures = [info.traceback or info.error] if info.status not in ("ok", "disabled") else _failures(info)
        notes = [f"{r.name} needs {n}, which {unmet(n)}" for r in _offers(info) for n in r.component.needs if unmet(n)]
        status = "broken" if info.status == "ok" and failures else info.status
        print(f"{info.name} {info.version}: {status}".replace(" :", ":"))
        for line in notes + failures:
            print("  " + line.rstrip().replace("\n", "\n  "))
        broken = broken or bool(failures)
    if broken:
        raise typer.Exit(1)


@app.command()
def freeze() -> None:
    """Print the plugins in use as requirements for pip."""
    for plugin in current().freeze():
        line = f"{plugin['distribution']}=={plugin['version']}"
        print(f"# {plugin['name']} is a file" if plugin["distribution"] == FILE else line)


def _plugins(name: str | None) -> list[PluginInfo]:
    """All plugins, or those called ``name`` (several when they are duplicates)."""
    known = current().plugins
    found = [info for info in known if name in (None, info.name)]
    if not found:
        raise unknown_name("plugin", str(name), [info.name for info in known], hint=current().hint(f"{name}/"))
    return found


def _offers(info: PluginInfo) -> list[Registered]:
    """What a plugin registered, by kind and name."""
    return [r for kind in PLURALS.values() for r in current().list(kind) if r.plugin == info.name]


def _failures(info: PluginInfo) -> list[str]:
    """Tracebacks of targets and configs that can't be imported although what they need is installed."""
    registry, failures = current(), []
    targets = {
        t: r.name
        for r in _offers(info)
        if not any(map(unmet, r.component.needs))
        for t in (r.component.target, r.component.config)
        if t
    }
    targets |= {c.target: c.name for c in registry.commands() if info.name in ("core", c.name)}
    for target, owner in targets.items():
        try:
            registry.resolve(target)
        except Exception as error:
            failures.append(f"{owner}: {one_line(error)}\n{''.join(traceback.format_exception(error))}")
    return failures
