"""The repository's frame: extras, sources, requirements and folders name the same plugins; imports keep the layers."""

from __future__ import annotations

import ast
import importlib.util
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLUGINS = sorted(p.parent.name for p in (ROOT / "plugins").glob("*/pyproject.toml"))
MEMBERS = ["core", *(f"plugins/{name}" for name in PLUGINS)]


def toml(folder: str) -> dict[str, dict]:  # type: ignore[type-arg]
    return tomllib.loads((ROOT / folder / "pyproject.toml").read_text("utf-8"))


def distribution(member: str) -> str:
    return "clipgraft" if member == "core" else f"clipgraft-{member.removeprefix('plugins/')}"


def test_every_plugin_folder_is_a_plugin() -> None:
    assert sorted(p.name for p in (ROOT / "plugins").iterdir() if p.is_dir()) == PLUGINS


def test_extras_sources_and_requirements_name_every_member() -> None:
    root = toml(".")
    extras = root["project"]["optional-dependencies"]
    assert extras.pop("all") == [f"clipgraft-workspace[{','.join(PLUGINS)}]"]
    assert extras == {name: [f"clipgraft-{name} @ {{root:uri}}/plugins/{name}"] for name in PLUGINS}
    assert root["project"]["dependencies"] == ["clipgraft @ {root:uri}/core"]
    assert "Private :: Do Not Upload" in root["project"]["classifiers"]
    assert root["tool"]["uv"]["sources"] == {distribution(member): {"workspace": True} for member in MEMBERS}
    lines = (ROOT / "requirements-dev.txt").read_text("utf-8").splitlines()
    assert [line.partition("[")[0] for line in lines if line.startswith("-e")] == [f"-e ./{m}" for m in MEMBERS]


@pytest.mark.parametrize("member", MEMBERS)
def test_a_member_is_packaged_like_the_others(member: str) -> None:
    project, name = toml(member)["project"], distribution(member)
    package = name.replace("-", "_")
    assert project["name"] == name and project["requires-python"] == toml(".")["project"]["requires-python"]
    assert project["version"] == toml(".")["project"]["version"]
    assert (ROOT / member / project["readme"]).is_file() and (ROOT / member / "src" / package / "py.typed").is_file()
    if member != "core":
        plugin = member.removeprefix("plugins/")
        assert project["entry-points"] == {"clipgraft.v1": {plugin: f"{package}.plugin"}}
        assert any(re.match(r"clipgraft\b(?!-)", requirement) for requirement in project["dependencies"])


def imports(path: Path, *, top: bool = False) -> Iterator[str]:
    """Modules that a file imports; ``top`` leaves out those inside functions."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in tree.body if top else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


@pytest.mark.parametrize("member", MEMBERS)
def test_no_member_imports_a_plugin_but_itself(member: str) -> None:
    own = distribution(member).replace("-", "_")
    for path in (ROOT / member / "src").rglob("*.py"):
        for module in imports(path):
            root = module.partition(".")[0]
            assert root in (own, "clipgraft") or not root.startswith("clipgraft"), f"{path} imports {module}"


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_manifest_imports_records_only(plugin: str) -> None:
    manifest = ROOT / "plugins" / plugin / "src" / f"clipgraft_{plugin}" / "plugin.py"
    own = f"clipgraft_{plugin}."
    assert set(imports(manifest, top=True)) <= {"__future__", "typing", "clipgraft.spec"}
    later = set(imports(manifest)) - set(imports(manifest, top=True))  # a hook that opens a model imports when called
    assert all(module.startswith(own) for module in later)


@pytest.mark.parametrize("plugin", PLUGINS)
def test_the_core_knows_what_to_install_for_every_name(plugin: str) -> None:
    """Names that are typed, such as in ``clipgraft run m2-clip``, when the plugin that brings them is missing."""
    from clipgraft.registry import KNOWN_PLUGINS, Registry, current

    typed = ("recipe", "dataset", "evaluator")
    records = [record for kind in typed for record in current().list(kind) if record.plugin == plugin]
    assert {record.component.name for record in records} <= set(KNOWN_PLUGINS[plugin].split())
    for record in records:
        assert f"pip install clipgraft-{plugin}" in Registry().hint(record.component.name)


def test_the_guide_names_every_session() -> None:
    tree = ast.parse((ROOT / "noxfile.py").read_text("utf-8"))
    sessions = {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and "nox.session" in " ".join(map(ast.unparse, node.decorator_list))
    }
    guide = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    assert sessions == set(re.findall(r"^\| `nox -s \"?(\w+)", guide, re.MULTILINE))


def test_click_is_never_imported() -> None:
    for path in [*ROOT.glob("core/src/**/*.py"), *ROOT.glob("plugins/*/src/**/*.py")]:
        assert "click" not in {module.partition(".")[0] for module in imports(path)}, path


def test_files_have_names_that_say_something() -> None:
    said_nothing = {"utils", "helpers", "misc", "common", "util", "helper"}
    assert not [p for p in ROOT.glob("*/**/src/**/*.py") if p.stem in said_nothing]
    test_folders = [ROOT / "tests", *(ROOT / member / "tests" for member in MEMBERS)]
    assert not [p for folder in test_folders for p in folder.rglob("__init__.py")]


def test_the_core_stays_within_its_limits() -> None:
    """Decision 14: what doesn't fit goes into a plugin, or replaces something."""
    spec = importlib.util.spec_from_file_location("core_size", ROOT / "docs" / "core_size.py")
    assert spec is not None and spec.loader is not None
    counter = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(counter)
    texts = {path: path.read_text("utf-8") for path in (ROOT / "core" / "src").rglob("*.py")}
    tests = [text for path, text in texts.items() if counter.TESTING in path.parents]
    assert sum(map(counter.code_lines, tests)) <= 1500
    assert sum(map(counter.code_lines, texts.values())) - sum(map(counter.code_lines, tests)) <= 8050
    assert not [path for path, text in texts.items() if len(text.splitlines()) > 500]
