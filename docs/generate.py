"""Writes the reference pages from the code: hooks, commands, configuration, components, Python API, toy models.

    python docs/generate.py [--out DIR]

Every plugin of this repository must be installed and sound, because the pages list what they register. Other
installed plugins are left out.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, get_args, get_type_hints

ROOT = Path(__file__).resolve().parent.parent
NOTE = "<!-- Written by docs/generate.py from the code. Change the code, then run it again. -->\n\n"

ARGUMENTS = {
    "uri": "a model reference as the user wrote it, such as `hf:ORG/NAME` or a directory",
    "run": "the `Run`: its directory, configuration, seed, device, log, current encoder, and `stop_requested`",
    "stage": "the stage that runs: a `TrainStage` (an `nn.Module`) or a `JobStage`",
    "result": "the `StageResult`: encoder, components by name, metrics",
    "step": "number of the optimizer step, counted from 0 (`on_evaluate`: how many steps are done)",
    "batch": "the `Batch` on its device: `pixels` (B, 3, H, W') in [0, 1], `ids`, and what the data has",
    "output": "the `StepOutput`: detached `loss`, named `terms`, `size`",
    "state": "what this hook returned from `on_save` when the state was written",
    "error": "the exception that ends the run",
}
"""What the arguments of hooks are; a hook with an argument that is missing here can't be documented."""

PLUGIN_MODULES = {
    "clipgraft.config.schema": "Config RunConfig TrainConfig",
    "clipgraft.stage": "ContrastiveStage",
    "clipgraft.execution": "Result",
    "clipgraft.runner": "Run",
    "clipgraft.encoders.base": "Graft Preprocess",
    "clipgraft.losses.base": "Loss LossInputs gathered_unit",
    "clipgraft.data.base": "Source Sample PairSource Pair BadSample",
    "clipgraft.evaluation.base": "Evaluator Evaluation Features",
    "clipgraft.claims": "Claim Arm Gain Kept",
    "clipgraft.reporting": "Section Figure Picture Table",
    "clipgraft.rundir": "RunRecord",
    "clipgraft.checkpoint": "write_export open_export",
    "clipgraft.distributed": "gather_with_grad",
    "clipgraft.testing.tiny": "tiny_clip",
    "clipgraft.testing.ranks": "run_ranks",
}
"""What plugins import beside ``clipgraft`` itself."""

KIND_TITLES = {
    "encoder": "Encoders", "graft": "Grafts", "head": "Heads", "loss": "Losses", "dataset": "Data sources",
    "evaluator": "Evaluators", "suite": "Suites", "recipe": "Recipes", "run-hook": "Lifecycle hooks", "claim": "Claims",
    "exporter": "Export formats", "report": "Sections of reports",
}  # fmt: skip

KIND_USES = {
    "encoder": "a model reference: `model.from`, `clipgraft eval MODEL`, `clipgraft.load(MODEL)`",
    "graft": "an entry of `grafts:`",
    "head": "by a stage, from Python",
    "loss": "an entry of `losses:` in `core/finetune`",
    "dataset": "a data reference with settings in the query: `NAME?key=value&key=value`",
    "evaluator": "an entry of `evaluate.on:`, or `clipgraft eval --on NAME`",
    "suite": "`clipgraft eval --suite NAME`, `clipgraft compare --suite NAME`, `evaluate.retention: NAME`",
    "recipe": "`clipgraft run NAME[:PRESET]`",
    "run-hook": "an entry of `hooks:`",
    "claim": "`clipgraft claims NAME`",
    "exporter": "`clipgraft export MODEL --format NAME`",
    "report": "`clipgraft report RUN`",
}


def code(text: object) -> str:
    """Inline code that survives a table cell, on GitHub as well as in MkDocs."""
    plain = str(text)
    return f"`{plain}`" if "|" not in plain else f"<code>{escape(plain, quote=False).replace('|', '&#124;')}</code>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; empty when there are no rows."""
    lines = [" | ".join(cells) for cells in rows]
    if not lines:
        return ""
    return "\n".join(f"| {line} |" for line in (" | ".join(head), " | ".join("---" for _ in head), *lines)) + "\n"


def prose(docstring: str | None) -> str:
    """A docstring as Markdown: ``code`` becomes `code`, lines and sentences that go on are joined."""
    text = re.sub(r"(?<![.:;])\n\s*\n(?=[a-z`])", " ", inspect.cleandoc(docstring or ""))
    joined = "\n\n".join(" ".join(p.split()) for p in re.split(r"\n\s*\n", text)).replace("``", "`")
    parts = joined.split("`")  # odd ones are code
    return "`".join(
        p if k % 2 else re.sub(r"(?<=\w)\*(?=\w)", r"\\*", p).replace("<", "&lt;") for k, p in enumerate(parts)
    )


def cell(docstring: str | None) -> str:
    """A docstring as one table cell."""
    return " ".join(prose(docstring).split()).replace("|", "\\|")


class Written:
    """An annotation as the source has it, without quotes."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def signature(function: Callable[..., Any], *, name: str = "", wrap: bool = False) -> str:
    """``name(arguments) -> type`` without ``self`` and module paths; ``wrap`` puts long ones on several lines."""

    def written(annotation: Any) -> Any:
        return Written(annotation) if isinstance(annotation, str) else annotation

    found, name = inspect.signature(function), name or function.__name__
    kept = [
        p.replace(annotation=written(p.annotation)) for p in found.parameters.values() if not p.name.startswith("_")
    ]
    kept = kept[1:] if kept and kept[0].name in ("self", "cls") else kept
    made = found.replace(parameters=kept, return_annotation=written(found.return_annotation))
    result = "" if made.return_annotation in (made.empty, None) or inspect.isclass(function) else made.return_annotation
    arguments = re.split(r"(?:^|, )(?=\*?\w+(?::|=|,|$)|\*,)", str(made.replace(return_annotation=made.empty))[1:-1])[
        1:
    ]
    broken = wrap and len(str(made)) + len(name) > 100
    inner = "".join(f"\n    {a}," for a in arguments) + "\n" if broken else ", ".join(arguments)
    text = f"{name}({inner})" + (f" -> {result!r}" if result else "")
    return re.sub(r"\b(?:[a-z_]+[.])+(?=[A-Z])|\bbuiltins[.]", "", text)


# -- pages ---------------------------------------------------------------------------------------------------------


def hooks() -> str:
    """Both hook namespaces."""
    from clipgraft import hookspecs, runhooks

    registration = [f for n, f in vars(hookspecs).items() if n.startswith("clipgraft_")]
    lifecycle = [f for n, f in vars(runhooks.Lifecycle).items() if not n.startswith("_")]
    return "\n".join(
        [
            "# Hooks\n",
            "Two namespaces. Registration hooks are functions of a plugin's manifest; they return records and have no "
            "effects. Lifecycle hooks are methods of an object that a run switches on; they are called while it "
            "runs. See [the plugin system](../explanation/plugins.md) for the reasons and "
            "[Write a plugin](../how-to/write-a-plugin.md) for the steps.\n",
            "## Registration hooks\n",
            "Mark each with `@hookimpl` from `clipgraft.spec`. The record classes are described in the "
            "[Python API](python-api.md#component). A default argument in an implementation is an error.\n",
            *(_hook(f, marker="hookimpl") for f in registration),
            "## Lifecycle hooks\n",
            "Mark each method with `@runhook` from `clipgraft.spec`. A method may take any subset of the arguments. "
            "Only hooks that a config or recipe names are on: `hooks: [{use: PLUGIN/NAME, ...}]`. A hook that raises "
            "fails the run; an object with `observer = True` is reported once and muted instead.\n",
            *(_hook(f, marker="runhook") for f in lifecycle),
        ]
    )


def _hook(function: Callable[..., Any], *, marker: str) -> str:
    options = getattr(function, "clipgraft_spec" if marker == "hookimpl" else "clipgraft_run_spec")
    names = [name for name in inspect.signature(function).parameters if name != "self"]
    lines = [f"### {function.__name__}\n", f"```python\n{signature(function)}\n```\n", prose(function.__doc__) + "\n"]
    if names:
        lines.append("\n".join(f"- `{name}`: {ARGUMENTS[name]}" for name in names) + "\n")
    if options["firstresult"]:
        lines.append("The first implementation that returns something other than `None` ends the search.\n")
    return "\n".join(lines)


def command_line() -> str:
    """Every command with its arguments and options."""
    import typer

    from clipgraft.cli import app

    root: Any = typer.main.get_command(app)
    context = root.make_context("clipgraft", ["list"])
    lines = [
        "# Command line\n",
        "```\nclipgraft [GLOBAL OPTIONS] COMMAND [ARGUMENTS] [OPTIONS]\n```\n",
        "Exit codes: 0 done, 1 failed while working, 2 bad input, 130 interrupted with the state saved. Errors are "
        "one line on stderr. With `--json`, stdout holds one JSON document and nothing else; messages go to "
        "stderr.\n",
        "`python -m clipgraft` is the same program.\n",
        "## Global options\n",
        _options(root),
        "## Environment variables\n",
        table(
            ["variable", "meaning"],
            [
                ("`CLIPGRAFT_PLUGINS`", "comma-separated plugins to load; all others are not imported; empty: none"),
                ("`CLIPGRAFT_DISABLE`", "comma-separated plugins to leave out"),
                ("`CLIPGRAFT_STRICT`", "`1`: a plugin that can't be loaded is an error instead of a warning"),
            ],
        ),
    ]
    for name in root.list_commands(context):
        _, command, _ = root.resolve_command(context, [name])
        lines += _command(command, f"clipgraft {name}", "##")
    return "\n".join(lines)


def _command(command: Any, title: str, level: str) -> Iterator[str]:
    """One command, or a group with its commands."""
    yield f"{level} {title}\n"
    yield f"{prose(command.help)}\n"
    if hasattr(command, "list_commands"):
        for name, inner in command.commands.items():
            yield from _command(inner, f"{title} {name}", level + "#")
        return
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    shown = " ".join(f"[{_metavar(p)}]" if not p.required else _metavar(p) for p in arguments)
    yield f"```\n{title} {shown} [OPTIONS]\n```\n".replace("  ", " ")
    described = [(_metavar(p), p.help) for p in arguments if p.help]
    yield table(["argument", "meaning"], ([code(name), text] for name, text in described))
    yield _options(command)


def _metavar(parameter: Any) -> str:
    return re.sub(r"^\[(.*)\](\.\.\.)?$", r"\1\2", str(parameter.metavar or parameter.name.upper()))


def _options(command: Any) -> str:
    annotations = get_type_hints(inspect.unwrap(command.callback))

    def row(option: Any) -> list[str]:
        flag = ", ".join([*option.opts, *option.secondary_opts])
        value = "" if option.is_flag else f" {option.metavar or _value(annotations[option.name])}"
        default = option.default
        plain = default is not None and not option.is_flag and not callable(default) and default != [] and default != ()
        text = (option.help or "").rstrip(".").replace("|", "\\|")
        text += "; repeatable" if option.multiple and "repeatable" not in text else ""
        return [code(flag + value), text, code(default) if plain else "required" if option.required else ""]

    hidden = {"help", "install_completion", "show_completion"}
    options = [p for p in command.params if p.param_type_name == "option" and p.name not in hidden]
    return table(["option", "meaning", "default"], map(row, options))


def _value(annotation: Any) -> str:
    """What stands for an option's value: N, PATH, one of some words, or TEXT."""
    kinds = set(get_args(annotation)) - {type(None)} or {annotation}
    if all(isinstance(kind, str) for kind in kinds):
        return "|".join(get_args(annotation))
    names = {int: "N", float: "X", Path: "PATH"}
    return next((names[kind] for kind in kinds if kind in names), "TEXT")


def _settings(cls: Any, *, without: frozenset[str] = frozenset()) -> str:
    """Every key of a config model, but for those in ``without``."""
    import json

    from clipgraft.config.describe import describe

    rows = []
    for row in describe(cls):
        if row.key in without:
            continue
        default = "required" if row.required else code(json.dumps(row.default, ensure_ascii=False))
        text = row.description.replace("|", "\\|")
        rows.append([code(row.key), code(row.type), default, f"{text} [{row.unit}]".strip() if row.unit else text])
    return table(["key", "type", "default", "meaning"], rows)


def configuration(registry: Any) -> str:
    """RunConfig, then what each recipe adds or sets differently."""
    from clipgraft.config.describe import describe
    from clipgraft.config.load import presets
    from clipgraft.config.schema import RunConfig, TrainConfig

    lines = [
        "# Configuration\n",
        "A run's configuration is put together in this order, later ones win: the recipe's YAML (its preset), your "
        "YAML files (`--config FILE`, which may say `extends: RECIPE:PRESET`), `--set key=value`. The result is "
        "written in full to `config.yaml` of the run directory. `clipgraft config show RECIPE` prints it without "
        "running anything, `clipgraft config schema RECIPE` prints these tables, and `clipgraft config diff A B` "
        "compares two.\n",
        "Rules:\n",
        "- Unknown keys are errors, with close matches.\n"
        "- YAML scalars follow YAML 1.2: `1e-4` is a number; only `true` and `false` are booleans; `no`, `yes`, `on` "
        "and dates are text. A key given twice is an error.\n"
        "- A component is `{use: NAME, setting: value}`, or just its name. YAML names registered components only, "
        "never a Python path.\n"
        "- In `--set`, a number in a path is a list index: `--set evaluate.on.0.data=toyworld/pairs`.\n",
        "Type names: `graft`, `loss`, `evaluator` and `run-hook` stand for a component of that kind; their settings "
        "are on the page [Components](components.md).\n",
        "## Every recipe\n",
        _settings(RunConfig),
    ]
    common = {row.key: (row.type, row.default, row.required) for row in describe(RunConfig)}
    blocks = {row.key: row for row in describe(TrainConfig)}
    lines += [
        "## A training stage\n",
        "A recipe has one such block per training stage, named in the recipe's own table below.\n",
        _settings(TrainConfig),
    ]
    for recipe in registry.list("recipe"):
        cls = registry.config_class("recipe", recipe.name)
        lines += [f"## {recipe.name}\n", f"{recipe.component.summary}.\n"]
        rows = describe(cls)
        same = {r.key for r in rows if common.get(r.key) == (r.type, r.default, r.required)}
        trains = {r.key.removesuffix(".steps") for r in rows if r.key.endswith("train.steps")}
        inner = {f"{train}.{key}" for train in trains for key in blocks}
        names = sorted(name for name in presets(recipe, registry=registry) if name)
        lines.append(_settings(cls, without=frozenset(same | inner)))
        lines.append("Training stages (keys as above): " + ", ".join(code(t) for t in sorted(trains)) + ".\n")
        if names:
            lines.append("Presets: " + ", ".join(code(f"{recipe.component.name}:{n}") for n in names) + ".\n")
    return "\n".join(lines)


def components(registry: Any) -> str:
    """The registry, by kind."""
    from clipgraft.config.load import presets

    plugins = [p for p in registry.plugins if p.status == "ok"]
    lines = [
        "# Components\n",
        "Everything that the core and the plugins of this repository register, by kind. The bare name works while it "
        "is unique. `clipgraft list KIND` and `clipgraft show NAME` print the same for what is installed on your "
        "machine.\n",
        table(
            ["plugin", "distribution", "components"],
            ([code(p.name), code(p.distribution), str(len(p.components))] for p in plugins),
        ),
    ]
    for kind, title in KIND_TITLES.items():
        found = registry.list(kind)
        lines += [f"## {title}\n", f"Used as: {KIND_USES[kind]}.\n"]
        if not found:
            lines.append("None in this edition.\n")
        for r in found:
            lines += [f"### {r.name} ({r.kind})\n", f"{r.component.summary}.\n"]
            facts = {"Paper": r.component.paper, "Needs": ", ".join(code(n) for n in r.component.needs)}
            names = sorted(name for name in presets(r, registry=registry) if name)
            facts["Presets"] = ", ".join(code(f"{r.component.name}:{name}") for name in names)
            lines.append("".join(f"- {label}: {text}\n" for label, text in facts.items() if text))
            if kind == "recipe":
                anchor = re.sub(r"[^\w\- ]", "", r.name)
                lines.append(f"Settings: [Configuration](configuration.md#{anchor}).\n")
            elif kind == "claim":
                lines.append(_claim(registry.resolve(r.component.target)))
            elif r.component.config:
                lines.append(_settings(registry.config_class(kind, r.name)))
    return "\n".join(line for line in lines if line)


def _claim(claim: Any) -> str:
    """Statement, rule and arms, as they were written before any number."""
    arms = [("after", claim.method), *((arm.name, arm) for arm in claim.controls)]
    listed = "\n".join(f"- {name}: `{' '.join((a.recipe, *a.overrides))}` {a.note}".rstrip() for name, a in arms)
    bases = ", ".join(code(b) for b in claim.bases)
    return f"> {claim.statement}\n\n{claim.rule}\n\nBases: {bases}. Arms:\n\n{listed}\n"


def python_api() -> str:
    """Every name of ``clipgraft.__all__``, then what plugins import from modules."""
    import clipgraft

    names = sorted(set(clipgraft.__all__) - {"__version__"}, key=str.lower)
    lines = [
        "# Python API\n",
        "## The package\n",
        "What `import clipgraft` offers. Importing it loads neither torch nor any plugin; names load on first use. "
        "`clipgraft.__version__` is the installed version of the core.\n",
    ]
    for name in names:
        lines += _described(getattr(clipgraft, name), name)
    lines += ["## For plugins\n", "What a plugin imports from modules of the core.\n"]
    for module, wanted in PLUGIN_MODULES.items():
        loaded = import_module(module)
        for name in wanted.split():
            lines += [*_described(getattr(loaded, name), name), f"Import it from `{module}`.\n"]
    return "\n".join(lines)


def _described(value: Any, name: str) -> Iterator[str]:
    """A class with its members, a function, or a marker."""
    yield f"### {name}\n"
    if hasattr(value, "project_name"):
        yield f"Marks hooks of the namespace `{value.project_name}`; see [Hooks](hooks.md).\n"
        return
    if not inspect.isclass(value) or ("__init__" in vars(value) and not issubclass(value, Exception | Protocol)):
        yield f"```python\n{signature(value, name=name, wrap=True)}\n```\n"
    yield prose(value.__doc__) + "\n"
    if hasattr(value, "model_fields"):
        yield "Its keys are on the page [Configuration](configuration.md).\n"
    elif inspect.isclass(value):
        yield table(["member", "meaning"], _members(value))


def _members(cls: type) -> Iterator[list[str]]:
    """Public methods and properties that the class itself documents."""
    for name, member in vars(cls).items():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        public = not name.startswith("_") or name in ("__len__", "__getitem__", "__call__")
        if public and inspect.isfunction(function) and function.__doc__:
            shown = name if isinstance(member, property) else signature(function, name=name)
            yield [code(shown), cell(function.__doc__)]


def toy_models() -> str:
    """What the toy world ships, from its manifest."""
    manifest = import_module("clipgraft_toyworld.models").manifest()
    models = manifest["models"]
    lines = [
        "# Toy-world models\n",
        "The models inside `clipgraft-toyworld`, as their manifest describes them. Metrics were measured when they "
        "were built, on the test split, with the stored 16-bit weights. `clipgraft toyworld manifest --json` prints "
        f"all of it with recipes and hashes; `{manifest['command']}` builds them again.\n",
        f"World version {manifest['world']}. All files: {_size(models):.1f} MB.\n",
    ]
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, entry in models.items():
        groups.setdefault(tuple(sorted(entry["metrics"])), []).append(name)
    for names in groups.values():
        metrics = models[names[0]]["metrics"]
        head = [("seed", lambda e: str(e["seed"])), ("CPU seconds to build", lambda e: f"{e['cpu_seconds']:.0f}")]
        rows = [[title, *(show(models[n]) for n in names)] for title, show in head]
        rows += [[code(metric), *(f"{models[n]['metrics'][metric]:.3f}" for n in names)] for metric in metrics]
        lines += [f"## {', '.join(names)}\n", table(["", *names], rows)]
    return "\n".join(lines)


def _size(models: dict[str, Any]) -> float:
    return sum(file["bytes"] for entry in models.values() for file in entry["files"].values()) / 1e6


def repository_registry() -> Any:
    """The registry with the plugins of this repository alone, all of them sound."""
    from clipgraft.registry import Registry

    names = sorted(folder.parent.name for folder in ROOT.glob("plugins/*/pyproject.toml"))
    registry = Registry.discover(allow=names, disable=[])
    status = {plugin.name: plugin.status for plugin in registry.plugins}
    if bad := [f"{name} ({status.get(name, 'not installed')})" for name in names if status.get(name) != "ok"]:
        sys.exit(f"can't document {', '.join(bad)}; pip install -r requirements-dev.txt, then clipgraft plugins doctor")
    return registry


def generate(out: Path) -> list[Path]:
    """Write all pages below ``out``; returns their paths."""
    from clipgraft.registry import use

    registry = repository_registry()
    with use(registry):
        pages = {
            "hooks.md": hooks(),
            "command-line.md": command_line(),
            "configuration.md": configuration(registry),
            "components.md": components(registry),
            "python-api.md": python_api(),
            "toy-world-models.md": toy_models(),
        }
    folder = out / "reference"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages.items():
        (folder / name).write_text(NOTE + re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n", encoding="utf-8")
    return [folder / name for name in pages]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder that gets reference/*.md")
    for path in generate(parser.parse_args().out):
        print(path)


if __name__ == "__main__":
    if find_spec("clipgraft") is None:
        sys.exit("clipgraft is not installed; pip install -r requirements-dev.txt")
    main()
