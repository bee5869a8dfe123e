"""Any words after ``clipgraft``, any plugin file: an exit code, one line, and never a traceback."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from clipgraft.checkpoint import write_export
from clipgraft.cli import app
from clipgraft.testing.tiny import tiny_clip

pytestmark = [pytest.mark.fuzz, pytest.mark.timeout(3600)]
many, some, few = (settings.get_profile(f"fuzz-{name}") for name in ("many", "some", "few"))

LONG = ("demo", "claims", "toyworld build", "toyworld sensitivity", "toyworld manifest")
"""Commands that may work for minutes when their arguments are good: only their help and bad options are tried."""


@dataclass(frozen=True)
class Parameter:
    """``flag`` is empty for an argument; ``takes`` a value or not."""

    name: str
    flag: str
    takes: bool
    required: bool


def commands() -> dict[str, list[Parameter]]:
    """Every command with its parameters."""
    root: Any = typer.main.get_command(app)
    context = root.make_context("clipgraft", ["list"])
    found: dict[str, list[Parameter]] = {}

    def walk(command: Any, path: list[str]) -> None:
        if hasattr(command, "list_commands"):
            for name in command.list_commands(context):
                inner = command.get_command(context, name)
                walk(root.resolve_command(context, [name])[1] if not path else inner, [*path, name])
            return
        found[" ".join(path)] = [
            Parameter(
                p.name, p.opts[0] if p.param_type_name == "option" else "", not getattr(p, "is_flag", False), p.required
            )
            for p in command.params
        ]

    walk(root, [])
    return found


COMMANDS = commands()
LIKELY = {
    "model": ["model"], "models": ["model"], "base": ["model"], "second": ["model"], "teacher": ["model"],
    "a": ["model"],
    "data": ["csv:pairs.csv", "folder:pictures", "videos:list.csv"], "source": ["csv:pairs.csv", "folder:pictures"],
    "images": ["pictures"], "videos": ["pictures"], "labels": ["red,blue", "labels.txt"], "query": ["red"],
    "on": ["zero-shot", "retrieval", "core/pairs"], "file": ["e.safetensors", "pairs.csv"], "run": ["model"],
    "what": ["recipes", "losses"], "recipe": ["finetune", "core/finetune"], "name": ["core", "finetune"],
    "batch_size": ["2", "0", "-1"], "workers": ["0", "-1"], "top": ["3"], "most": ["2"], "alpha": ["0.5", "2"],
    "scale": ["0.3", "nan"], "density": ["0.2", "0"], "format": ["open_clip", "huggingface", "x"], "rows": ["1"],
    "class_name": ["thing"], "threshold": ["0.5"], "seed": ["1", "-1"], "alphas": ["0,1"], "classes": ["labels.txt"],
    "config": ["pairs.csv", "c.yaml"], "set_": ["model.from=model", "data.from=csv:pairs.csv", "train.steps=1"],
}  # fmt: skip
VALUES = st.one_of(
    st.sampled_from(
        ["model", "pictures", "pairs.csv", "csv:pairs.csv", "folder:pictures", "nowhere", "", ".", "/", "-1", "0"]
    ),
    st.sampled_from(
        ["1", "10" * 40, "nan", "x=y", "core/finetune", "finetune", "zero-shot", "core/retrieval", "toyworld/images"]
    ),
    st.sampled_from(
        ["recipes", "~nobody-here", "a" * 300, "a/b/c", "--", "\udcff", "é\u202e", "[bold]", "%s", "{}", "$(id)", "\n"]
    ),
    st.text(max_size=12).filter(lambda text: "\0" not in text),
)


@pytest.fixture(scope="module")
def place(arena) -> Path:
    """A model, two pictures and a table where every command runs."""
    for name in ("a", "b"):
        (arena.work / "pictures").mkdir(exist_ok=True)
        Image.new("RGB", (40, 40), "red" if name == "a" else "blue").save(arena.work / "pictures" / f"{name}.png")
    rows = "image,caption,label\npictures/a.png,red,0\npictures/b.png,blue,1\n"
    (arena.work / "pairs.csv").write_text(rows, "utf-8")
    (arena.work / "labels.txt").write_text("red\nblue\n", "utf-8")
    (arena.work / "list.csv").write_text("video,label\npictures/a.png,0\n", "utf-8")
    (arena.work / "c.yaml").write_text("train: {steps: 1, batch_size: 2, lr: 0.001}\n", "utf-8")
    save_file({"embeddings": torch.ones(2, 16)}, arena.work / "e.safetensors", {"ids": '["a", "b"]'})
    if not (arena.work / "model").exists():
        write_export(tiny_clip(), arena.work / "model")
    return Path(arena.work)


@many
@given(data=st.data(), name=st.sampled_from(sorted(COMMANDS)))
def test_any_words_are_done_or_refused(arena, place, data, name):
    words, parameters = list(name.split()), COMMANDS[name]
    optional = [p for p in parameters if not p.required]
    chosen = [p for p in parameters if p.required and data.draw(st.integers(0, 9))]  # now and then one is missing
    chosen += data.draw(st.lists(st.sampled_from(optional), max_size=3)) if optional else []
    for p in chosen:
        if p.flag in ("--out", "--quarantine", "--cache", "--ledger", "--index", "--html", "--maps", "--overlays"):
            value = str(arena.out / data.draw(st.sampled_from(["o", "o.json", "o/p", "o.safetensors", "o.png"])))
        elif p.flag in ("--resume", "--push-to-hub"):
            value = "nowhere"
        else:
            likely = p.name in LIKELY and data.draw(st.integers(0, 3))
            value = data.draw(st.sampled_from(LIKELY[p.name]) if likely else VALUES)
        words += [p.flag] * bool(p.flag) + [value] * p.takes
    if name in LONG:
        words.append(data.draw(st.sampled_from(["--help", "--no-such-option", "--seeds=x", "--effort=x"])))
    if "--out" in [p.flag for p in parameters] and "--out" not in words:
        words += ["--out", str(arena.out / "o")]
    arena.command(*words)
    shutil.rmtree(arena.out)
    arena.out.mkdir()


@some
@given(
    words=st.lists(
        st.one_of(VALUES, st.sampled_from([*(" ".join(COMMANDS)).split(), "--json", "--help", "--debug", "--version"])),
        max_size=5,
    )
)
def test_any_words_at_all_are_done_or_refused(arena, place, words):
    if set(words) & {"demo", "claims", "build", "sensitivity", "manifest", "run", "--install-completion", "--debug"}:
        return
    arena.command(*words)


@pytest.mark.parametrize("command", ["eval {} --on zero-shot --data csv:pairs.csv", "merging soup {} --out {out}/x"])
@pytest.mark.parametrize("name", ["~nobody-here/x", "x" * 300, "x/" * 3000])
def test_a_place_that_can_not_be_is_one_line(arena, place, command, name):
    if command.split()[0] not in {name.split()[0] for name in COMMANDS}:
        pytest.skip("the plugin is not here")
    assert arena.command(*(word.format(name, out=arena.out) for word in command.split())).code in (1, 2)


# -- plugin files --------------------------------------------------------------------------------------------------

HEAD = "from clipgraft.spec import CommandSpec, Component, hookimpl\n"
VALUES_OF_PYTHON = st.sampled_from(
    [
        "None",
        "3",
        "'x'",
        "''",
        "[]",
        "()",
        "{}",
        "object()",
        "lambda: 0",
        "b'x'",
        "'a b'",
        "'x:y'",
        "'os:system'",
        "'../x'",
    ]
)
RETURNS = st.one_of(
    st.sampled_from(["None", "3", "'x'", "[]", "()", "[3]", "[None]", "iter([])", "[Component]", "1 / 0", "[x]"]),
    st.builds(
        lambda kind, values: f"[{kind}({', '.join(f'{k}={v}' for k, v in values.items())})]",
        st.sampled_from(["Component", "CommandSpec"]),
        st.dictionaries(
            st.sampled_from(["name", "target", "config", "summary", "needs", "presets", "paper", "help"]),
            VALUES_OF_PYTHON,
        ),
    ),
)
HOOKS = st.sampled_from(
    ["grafts", "grafts", "losses", "commands", "recipes", "open", "evaluators", "datasets", "nothing"]
)
BODIES = st.one_of(
    st.builds(
        lambda hook, given, value: f"{HEAD}@hookimpl\ndef clipgraft_{hook}({given}):\n    return {value}\n",
        HOOKS,
        st.sampled_from(["", "uri", "x=1", "*a", "**k", "self"]),
        RETURNS,
    ),
    st.sampled_from(
        [
            "raise SystemExit(3)", "raise KeyboardInterrupt", "import sys; sys.exit()", "1 / 0", "def f(",
            "import no_such_module", "\0", "raise RecursionError", "def f(): f()\nf()", "raise BaseException('x')",
            "print('noise')", "", "raise Exception('a\\nb\\n' * 500)", "raise MemoryError", "raise GeneratorExit",
            "# -*- coding: no-such -*-", "import clipgraft.cli as c; c.main(['list'])",
            "class Odd(Exception):\n    def __str__(self): raise ValueError('x')\nraise Odd",
        ]
    ),
    st.text(max_size=30),
)  # fmt: skip


@many
@given(
    body=BODIES,
    words=st.sampled_from(
        [
            ["plugins", "list"],
            ["plugins", "doctor", "odd-plugin"],
            ["list", "grafts", "--json"],
            ["list", "recipes"],
            ["show", "x"],
            ["plugins", "show", "odd-plugin", "--json"],
        ]
    ),
)
def test_any_plugin_file_is_loaded_or_marked_broken(arena, place, body, words):
    """A plugin is code and is trusted; but a broken one never takes the tool down or its line apart."""
    file = place / "odd_plugin.py"
    file.write_text(body, "utf-8", "surrogatepass")
    arena.command("--plugin", str(file), *words, allowed=(0, 1, 2, 130))
    sys.modules.pop("odd_plugin", None)


@few
@given(
    content=st.binary(max_size=60),
    name=st.sampled_from(["odd_plugin.py", "os.py", "odd.plugin.py", "odd_plugin", "3.py", "é.py"]),
)
def test_any_bytes_are_a_plugin_file_or_refused(arena, place, content, name):
    (place / name).write_bytes(content)
    arena.command("--plugin", str(place / name), "plugins", "list")
    (place / name).unlink()
    sys.modules.pop("odd_plugin", None)
