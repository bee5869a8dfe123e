"""Discovery, isolation, names and building, on throw-away distributions that are nothing but files on the path."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from clipgraft.errors import ClipgraftError, InputError, PluginError, unknown_name
from clipgraft.registry import KNOWN_PLUGINS, PluginInfo, Registry, current, unmet, use

COUNT = itertools.count()


class Packages:
    """Writes distributions with an entry point; ``found`` discovers these alone."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.names = folder, set[str]()

    def add(self, name: str, manifest: str, *, group: str = "clipgraft.v1", distribution: str = "") -> str:
        """A package whose manifest is ``manifest``; returns its module."""
        module, distribution = f"sample_{next(COUNT)}", distribution or f"clipgraft-{name}"
        (self.folder / f"{module}.py").write_text(HEADER + dedent(manifest), "utf-8")
        info = self.folder / f"{distribution.replace('-', '_')}-1.2.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n", "utf-8")
        with (info / "entry_points.txt").open("a", encoding="utf-8") as file:
            file.write(f"[{group}]\n{name} = {module}\n")
        self.names.add(name)
        return module

    def found(self, **options: object) -> Registry:
        """The registry of these packages and the core."""
        return Registry.discover(**{"allow": self.names, **options})  # type: ignore[arg-type]


HEADER = "from clipgraft.spec import CommandSpec, Component, hookimpl\n"


def offering(hook: str, *records: str) -> str:
    """A manifest with one hook that returns ``records``."""
    body = f"@hookimpl\ndef clipgraft_{hook}():\n    return [{', '.join(records)}]\n"
    return body


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Packages:
    for variable in ("CLIPGRAFT_PLUGINS", "CLIPGRAFT_DISABLE", "CLIPGRAFT_STRICT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    return Packages(tmp_path)


def info(registry: Registry, name: str) -> PluginInfo:
    (found,) = [i for i in registry.plugins if i.name == name]
    return found


def test_records_are_listed_without_importing_their_targets(packages: Packages) -> None:
    packages.add(
        "one", offering("losses", "Component(name='b', target='absent.module:B')", "Component(name='a', target='x:A')")
    )
    registry = packages.found()
    assert [r.name for r in registry.list("loss") if r.plugin == "one"] == ["one/a", "one/b"]
    found = info(registry, "one")
    assert (found.status, found.distribution, found.version) == ("ok", "clipgraft-one", "1.2")
    assert found.components == ["one/a", "one/b"] and found.load_ms > 0 and Path(found.path).suffix == ".py"
    with pytest.raises(PluginError, match=r"absent\.module:B can't be imported: ModuleNotFoundError"):
        registry.resolve("absent.module:B")


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
        ("import absent_package", "ModuleNotFoundError"),
        ("import sys\nsys.exit(3)", "SystemExit: 3"),
        ("@hookimpl\ndef clipgraft_losses():\n    raise OSError('disk')", "hook clipgraft_losses raised OSError: disk"),
        ("@hookimpl\ndef clipgraft_losses():\n    return None", "must return a list of Component, got None"),
        ("@hookimpl\ndef clipgraft_losses():\n    return ['x']", "must return a list of Component"),
        ("@hookimpl\ndef clipgraft_loses():\n    return []", "did you mean clipgraft_losses"),
        ("@hookimpl\ndef clipgraft_losses(x):\n    return []", "PluginValidationError"),
        ("@hookimpl\ndef clipgraft_open(uri=None):\n    return None", "without default arguments"),
        ("@hookimpl(wrapper=True)\ndef clipgraft_losses():\n    return (yield)", "must be a plain function"),
        (
            offering("losses", "Component(name='a', target='x:A')", "Component(name='a', target='y:B')"),
            "loss bad/a twice",
        ),
        (offering("losses", "Component(name='a/b', target='x:A')"), "expected a lower-case name"),
        (offering("losses", "Component(name='a', target='no colon')"), "package.module:name"),
        (offering("losses", "Component(name='a', target='x:A', config='nope')"), "'nope'"),
        (offering("commands", "CommandSpec(name='other', target='x:a', help='')"), "one command group, named 'bad'"),
        (offering("commands", *["CommandSpec(name='bad', target='x:a', help='')"] * 2), "one command group"),
    ],
)
def test_a_broken_plugin_offers_nothing_and_hurts_nobody(
    packages: Packages, manifest: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    packages.add("bad", manifest)
    packages.add("good", offering("losses", "Component(name='a', target='x:A')"))
    registry = packages.found()
    bad = info(registry, "bad")
    assert bad.status == "broken" and message in bad.error and "Traceback" in bad.traceback
    assert "\n" not in bad.error and bad.components == []
    assert [r.name for r in registry.list("loss") if r.plugin != "core"] == ["good/a"]
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "plugin bad is broken" in captured.err
    with pytest.raises(PluginError, match="plugin bad is broken"):
        packages.found(strict=True)


def test_a_broken_plugin_is_not_asked_to_open_anything(packages: Packages) -> None:
    packages.add("bad", "@hookimpl\ndef clipgraft_open(uri):\n    return 'opened'\n" + offering("losses", "1"))
    registry = packages.found()
    assert info(registry, "bad").status == "broken" and registry.open("x") is None


@pytest.mark.parametrize("name", ["run", "embed", "plugins"])
def test_command_names_of_the_core_are_reserved(packages: Packages, name: str) -> None:
    packages.add(name, offering("commands", f"CommandSpec(name={name!r}, target='x:a', help='')"))
    assert "belongs to the core" in info(packages.found(), name).error


def test_a_manifest_that_prints_does_not_reach_stdout(packages: Packages, capsys: pytest.CaptureFixture[str]) -> None:
    packages.add("loud", "print('hello')")
    assert info(packages.found(), "loud").status == "ok"
    assert capsys.readouterr() == ("", "hello\n")


def test_another_api_major_is_reported_and_not_imported(packages: Packages) -> None:
    module = packages.add("future", "raise RuntimeError", group="clipgraft.v2")
    future = info(packages.found(), "future")
    assert future.status == "incompatible" and "clipgraft.v2" in future.error and module not in sys.modules


def test_a_package_may_serve_two_majors(packages: Packages) -> None:
    packages.add("both", "raise RuntimeError", group="clipgraft.v2")
    packages.add("both", offering("losses", "Component(name='a', target='x:A')"))
    assert info(packages.found(), "both").components == ["both/a"]


def test_two_distributions_with_one_name_are_both_refused(packages: Packages) -> None:
    modules = [packages.add("twin", "raise RuntimeError", distribution=d) for d in ("clipgraft-twin", "other-twin")]
    twins = [i for i in packages.found().plugins if i.name == "twin"]
    assert [i.status for i in twins] == ["duplicate", "duplicate"]
    assert {i.error.split(";")[0] for i in twins} == {"also offered by other-twin", "also offered by clipgraft-twin"}
    assert not set(modules) & sys.modules.keys()


def test_nobody_else_is_the_core(packages: Packages) -> None:
    packages.add("core", "raise RuntimeError", distribution="evil")
    cores = [i for i in packages.found().plugins if i.name == "core"]
    assert [(i.distribution, i.status) for i in cores] == [("clipgraft", "ok"), ("evil", "duplicate")]


def test_selection_happens_before_import(packages: Packages, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {name: packages.add(name, "raise RuntimeError") for name in ("a", "b")}
    assert {i.status for i in packages.found(allow=["zzz"]).plugins} == {"ok", "disabled"}
    monkeypatch.setenv("CLIPGRAFT_PLUGINS", "")
    assert {i.status for i in Registry.discover().plugins if i.name != "core"} == {"disabled"}
    monkeypatch.setenv("CLIPGRAFT_PLUGINS", "a, b")
    monkeypatch.setenv("CLIPGRAFT_DISABLE", "a")
    assert not set(modules.values()) & sys.modules.keys()
    assert [info(Registry.discover(), name).status for name in ("a", "b")] == ["disabled", "broken"]
    monkeypatch.setenv("CLIPGRAFT_STRICT", "1")
    with pytest.raises(PluginError, match="plugin b is broken"):
        Registry.discover()


def test_an_allowlist_that_names_nothing_installed_says_so(
    packages: Packages, capsys: pytest.CaptureFixture[str]
) -> None:
    packages.found(allow=["absent"])
    assert "names 'absent', which is not installed" in capsys.readouterr().err


def test_names(packages: Packages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KNOWN_PLUGINS, "absentone", "")
    monkeypatch.setitem(KNOWN_PLUGINS, "brokenone", "famous")
    packages.add("one", offering("datasets", *(f"Component(name={n!r}, target='x:A')" for n in ("tiny", "shared"))))
    packages.add("two", offering("datasets", "Component(name='shared', target='x:A')"))
    packages.add("brokenone", "raise ValueError")
    registry = packages.found()
    assert registry.get("dataset", "tiny").name == registry.get("dataset", "one/tiny").name == "one/tiny"
    with pytest.raises(InputError, match="ambiguous; write one of one/shared, two/shared"):
        registry.get("dataset", "shared")
    with pytest.raises(InputError, match=r"unknown dataset 'tinny'; did you mean tiny\?"):
        registry.get("dataset", "tinny")
    with pytest.raises(InputError, match=r"pip install clipgraft-absentone"):
        registry.get("dataset", "absentone/clips")
    with pytest.raises(InputError, match=r"Plugin brokenone is broken: clipgraft plugins doctor brokenone"):
        registry.get("recipe", "famous")
    with pytest.raises(InputError, match="unknown kind 'datasets'; did you mean dataset"):
        registry.list("datasets")  # type: ignore[arg-type]


def test_a_long_list_of_names_says_how_many_are_left_out() -> None:
    assert str(unknown_name("name", "?", "abc")).endswith("known: a, b, c.")
    assert str(unknown_name("name", "?", map(str, range(10, 30)))).endswith("20, 21 and 8 more.")


BUILDABLE = """
from pydantic import Field
from clipgraft.config.schema import Config

class Settings(Config):
    size: int = Field(3, gt=0)
    from_: str = Field("x", alias="from")

def make(*, size, from_):
    return ("made", size, from_)

def plain():
    return "plain"

claim = "the claim itself"

def clipgraft_parts(name, **more):
    return Component(name=name, target=f"{__name__}:{name}", **more)

@hookimpl
def clipgraft_heads():
    return [clipgraft_parts("make", config=f"{__name__}:Settings"), clipgraft_parts("plain"),
            clipgraft_parts("needy", needs=("absent-package>=2", "packaging>=1"))]

@hookimpl
def clipgraft_recipes():
    return [Component(name="echo", target="builtins:repr", config=f"{__name__}:Settings")]

@hookimpl
def clipgraft_claims():
    return [clipgraft_parts("claim")]
"""


def test_building(packages: Packages) -> None:
    packages.add("parts", BUILDABLE)
    registry = packages.found()
    assert registry.build("head", "make", {"size": 4, "from": "y"}) == ("made", 4, "y")
    assert registry.build("head", "parts/plain", {}) == "plain"
    assert registry.build("claim", "claim", {}) == "the claim itself"
    assert registry.build("recipe", "echo", {"size": 2}) == "Settings(size=2, from_='x')"
    assert registry.config_class("head", "plain") is None
    with pytest.raises(InputError, match=r"unknown key parts/make\.sise; did you mean parts/make\.size\?"):
        registry.build("head", "make", {"sise": 1})
    with pytest.raises(InputError, match="parts/plain has no settings, got size"):
        registry.build("head", "plain", {"size": 1})
    with pytest.raises(PluginError, match=r"needs absent-package>=2, which is not installed: pip install 'absent-"):
        registry.build("head", "needy", {})


def test_opening_asks_on_after_a_plugin_failed(packages: Packages) -> None:
    opener = "@hookimpl\ndef clipgraft_open(uri):\n    if uri.startswith({0!r}):\n        {1}\n"
    packages.add("a", opener.format("a", "return 'by a'"))
    packages.add("b", opener.format("", "raise KeyError(uri)"))
    packages.add(
        "c", opener.format("c", "raise ClipgraftError('c: damaged')") + "\nfrom clipgraft.errors import ClipgraftError"
    )
    registry = packages.found()
    assert registry.open("a:x") == "by a"
    with pytest.raises(PluginError, match="plugin b failed to open 'z': KeyError: 'z'"):
        registry.open("z")
    with pytest.raises(ClipgraftError, match="c: damaged"):
        registry.open("c:x")
    assert packages.found(disable=["b"]).open("z") is None


def test_requirements(packages: Packages) -> None:
    packages.add("one", "")
    registry = packages.found()
    registry.requires(["clipgraft-one>=1.0", "clipgraft_one<2", "pluggy"])
    for text, message in {
        "clipgraft-one>=1.3": r"which is installed as 1\.2: pip install 'clipgraft-one>=1\.3'",
        "clipgraft-two": "which is not installed",
        ">=1": "is no requirement",
    }.items():
        with pytest.raises(InputError, match=message):
            registry.requires([text])
    with pytest.raises(InputError, match="plugin one is disabled"):
        packages.found(disable=["one"]).requires(["clipgraft-one"])
    assert unmet("clipgraft-one==1.2") == ""


def test_a_file_is_a_plugin_for_one_invocation(packages: Packages, tmp_path: Path) -> None:
    file = tmp_path / "elsewhere" / "my_sample_plugin.py"
    file.parent.mkdir()
    file.write_text(
        HEADER + offering("heads", "Component(name='h', target='my_sample_plugin:H')") + "\nH = lambda: 7\n"
    )
    registry = Registry.discover(allow=[], files=[file])
    assert registry.build("head", "my-sample-plugin/h", {}) == 7
    assert {"name": "my-sample-plugin", "distribution": "(file)", "version": ""} in registry.freeze()
    assert all(r.plugin == "core" for r in Registry.discover(allow=[]).list("head"))
    del sys.modules["my_sample_plugin"]


def test_a_file_must_exist_and_not_shadow_a_module(packages: Packages, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        Registry.discover(allow=[], files=[tmp_path / "absent.py"])
    for name in ("json.py", "not-a-name.py"):
        (tmp_path / "sub").mkdir(exist_ok=True)
        (tmp_path / "sub" / name).write_text("")
        shadow = info(Registry.discover(allow=[], files=[tmp_path / "sub" / name]), name.removesuffix(".py"))
        assert shadow.status == "broken" and "rename the file" in shadow.error
    bad = tmp_path / "sub" / "sample_that_raises.py"
    bad.write_text("1 / 0")
    assert "ZeroDivisionError" in info(Registry.discover(allow=[], files=[bad]), "sample-that-raises").error
    assert "sample_that_raises" not in sys.modules


def test_the_current_registry_is_cached_and_replaceable(packages: Packages) -> None:
    mine = Registry.discover(allow=[])
    with use(mine):
        assert current() is mine
    assert current() is current() is not mine


def test_every_target_of_the_core_is_importable() -> None:
    registry = Registry.discover(allow=[])
    for kind in ("graft", "head", "loss", "dataset", "evaluator", "suite", "recipe", "encoder", "run-hook", "claim"):
        for registered in registry.list(kind):
            assert callable(registry.resolve(registered.component.target)), registered.name
            registry.config_class(kind, registered.name)
    for command in registry.commands():
        assert callable(registry.resolve(command.target)), command.name
