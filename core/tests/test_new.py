"""``clipgraft new plugin``: what it writes is whole, what it refuses is told in one line."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clipgraft.cli import main
from clipgraft.cli.new import package_of, write
from clipgraft.config.load import parse_yaml
from clipgraft.errors import InputError
from clipgraft.registry import Registry, use
from clipgraft.testing.declared import (
    configs_are_strict,
    imports_no_other_plugin,
    manifest_is_light,
    presets_survive_yaml,
    targets_resolve,
)
from clipgraft.testing.subject import Subject
from clipgraft.testing.trial import Trial, trains_as_declared

TEMPLATES = ("recipe", "merger", "head")
every_template = pytest.mark.parametrize("template", TEMPLATES)
Install = Callable[[str], Path]


@pytest.fixture(autouse=True)
def nothing_else(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The core alone, whatever is installed."""
    monkeypatch.setenv("CLIPGRAFT_PLUGINS", "my-idea")
    with use(Registry.discover(allow=[])):
        yield


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Write the plugin ``my-idea`` and make it importable, as ``pip install -e`` would."""

    def written(template: str) -> Path:
        folder = tmp_path / "my-idea"
        write("my-idea", template, folder)
        project = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]
        info = folder / "src" / "clipgraft_my_idea-0.1.0.dist-info"
        info.mkdir()
        lines = [f"{name} = {module}" for name, module in project["entry-points"]["clipgraft.v1"].items()]
        (info / "entry_points.txt").write_text("\n".join(["[clipgraft.v1]", *lines]) + "\n", "utf-8")
        head = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        (info / "METADATA").write_text(head, "utf-8")
        monkeypatch.syspath_prepend(str(folder / "src"))
        importlib.invalidate_caches()
        return folder

    yield written
    for name in [name for name in sys.modules if name.partition(".")[0] == "clipgraft_my_idea"]:
        del sys.modules[name]


@every_template
def test_every_file_is_whole(tmp_path: Path, template: str) -> None:
    files = write("my-idea", template, tmp_path / "new")
    assert {"LICENSE", "README.md", "pyproject.toml", "src/clipgraft_my_idea/plugin.py"} <= set(files)
    assert sum(name.startswith("tests/test_") for name in files) >= 2
    for name in files:
        text = (tmp_path / "new" / name).read_text("utf-8")
        assert "{{" not in text.replace("f'{{", "") and "PACKAGE" not in name and "NAME" not in name, name
        assert max(map(len, text.splitlines()), default=0) <= 120, name
        if name.endswith(".py"):
            tree = ast.parse(text, name)
            assert text == "" or ast.get_docstring(tree), f"{name} says nothing about itself"
        elif name.endswith(".yaml"):
            assert isinstance(parse_yaml(text, origin=name), dict)


@every_template
def test_it_declares_what_every_plugin_declares(install: Install, template: str) -> None:
    install(template)
    subject = Subject("my-idea")
    registry = subject.registry()
    manifest_is_light(subject)
    targets_resolve(subject, registry)
    configs_are_strict(subject, registry)
    presets_survive_yaml(subject, registry)
    imports_no_other_plugin(subject)
    kinds = [r.kind for r in subject.offers(registry)]
    assert "recipe" in kinds and "claim" in kinds
    assert ("loss" in kinds, "head" in kinds) == (template == "recipe", template == "head")
    assert [c.name for c in subject.commands(registry)] == ([] if template == "recipe" else ["my-idea"])


@every_template
def test_its_recipe_trains_without_the_toy_world(install: Install, template: str, tmp_path: Path) -> None:
    install(template)
    trial = Trial(Subject("my-idea"), "my-idea/my-idea", tmp_path / "trial")
    trains_as_declared(trial)
    manifest = json.loads((trial.whole[0] / "export" / "clipgraft.json").read_text("utf-8"))
    assert trial.replaced and manifest["level"] == ("L1" if template == "head" else "L0")


@pytest.mark.slow
@every_template
def test_its_own_tests_pass(install: Install, template: str) -> None:
    """With the conformance suite, as ``pytest FOLDER`` runs them after an installation."""
    folder = install(template)
    environment = {**os.environ, "PYTHONPATH": str(folder / "src")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    if "clipgraft.testing.pytest_plugin" not in str(importlib.metadata.entry_points(group="pytest11")):
        command += ["-p", "clipgraft.testing.pytest_plugin"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and "failed" not in done.stdout, done.stdout[-3000:]


# -- the command ---------------------------------------------------------------------------------------------------


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["new", "plugin", *words])
    return int(ended.value.code)  # type: ignore[arg-type]


def test_it_says_what_to_do_next(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("my-idea") == 0
    told = capsys.readouterr().out
    assert "clipgraft-my-idea: a recipe" in told and "pip install -e clipgraft-my-idea" in told
    assert "clipgraft run my-idea:tiny" in told and "clipgraft claims my-idea/keeps" in told
    assert (tmp_path / "clipgraft-my-idea" / "src" / "clipgraft_my_idea" / "stage.py").is_file()


@every_template
def test_the_claim_that_it_names_is_there(tmp_path, template, capsys):
    assert run("my-idea", f"--{template}", "--out", str(tmp_path / "new")) == 0
    claim = re.search(r"clipgraft claims my-idea/(\w+)", capsys.readouterr().out)[1]
    assert f'name="{claim}"' in (tmp_path / "new" / "src" / "clipgraft_my_idea" / "plugin.py").read_text("utf-8")


def test_json_names_the_files(tmp_path, capsys):
    assert run("my-idea", "--head", "--out", str(tmp_path / "new"), "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["template"], told["package"]) == ("head", "clipgraft_my_idea")
    there = [p for p in (tmp_path / "new").rglob("*") if p.is_file()]
    assert told["files"] == sorted(p.relative_to(tmp_path / "new").as_posix() for p in there)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("My_Idea", "my-idea would do"),
        ("1st", "lower-case letters, digits and single hyphens, a letter first; st would do"),
        ("a--b", "a-b would do"),
        ("é", "a letter first"),
        ("x" * 41, "lower-case letters"),
        ("clipgraft-idea", "write clipgraft new plugin idea"),
        ("core", "a name of the core"),
        ("run", "a name of the core"),
        ("search", "a name of the core"),
        ("class", "or of Python"),
        ("diffusion", "there is a plugin 'diffusion' already"),
    ],
)
def test_names_that_no_plugin_may_have_are_refused(name, said):
    with pytest.raises(InputError, match=said):
        package_of(name)


def test_the_name_of_a_package_that_is_there_is_refused(install):
    install("recipe")
    with pytest.raises(InputError, match="there is a package clipgraft_my_idea already"):
        package_of("my-idea")
    with use(Registry.discover()), pytest.raises(InputError, match="there is a plugin 'my-idea' already"):
        package_of("my-idea")


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path, capsys):
    (tmp_path / "new").mkdir()
    assert run("my-idea", "--out", str(tmp_path / "new")) == 0
    before = (tmp_path / "new" / "README.md").read_text("utf-8")
    assert run("my-idea", "--merger", "--out", str(tmp_path / "new")) == 2
    assert "is there and not empty; choose another folder with --out DIR" in capsys.readouterr().err
    assert (tmp_path / "new" / "README.md").read_text("utf-8") == before


def test_a_file_in_the_way_and_two_templates_are_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("", "utf-8")
    assert run("my-idea", "--out", str(tmp_path / "file" / "new")) == 2
    assert "choose a writable --out DIR" in capsys.readouterr().err
    assert run("my-idea", "--merger", "--head", "--out", str(tmp_path / "new")) == 2
    assert "--merger and --head are different templates" in capsys.readouterr().err
