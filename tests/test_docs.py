"""The pages say what the code does: hooks, commands, files, links and names are checked against it."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from clipgraft import hookspecs, runhooks
from clipgraft.cli import _command, app, main
from clipgraft.config.describe import describe
from clipgraft.config.load import load_recipe, parse_yaml
from clipgraft.manifests import PLURALS
from clipgraft.registry import Registry, use
from clipgraft.spec import KINDS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
TUTORIAL = DOCS / "tutorial" / "first-graft.md"
PLUGINS = sorted(path.parent.name for path in ROOT.glob("plugins/*/pyproject.toml"))
BLOCK = re.compile(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```', re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A code block; ``file`` is its title."""

    language: str
    file: str
    text: str


def blocks(page: Path) -> list[Block]:
    """The code blocks of a page, also those that are indented."""
    text = re.sub(r"^ {4}(?=```)", "", page.read_text("utf-8"), flags=re.MULTILINE)
    return [Block(*match.groups(default="")) for match in BLOCK.finditer(text)]


def inline(page: Path) -> list[str]:
    """What stands in backticks outside of blocks."""
    return re.findall(r"`([^`\n]+)`", BLOCK.sub("", page.read_text("utf-8")))


def commands(page: Path) -> Iterator[list[str]]:
    """Every ``clipgraft`` command in the shell blocks of a page, as words after the program's name."""
    for block in blocks(page):
        if block.language != "bash":
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                if "clipgraft" in words and words[0] in ("clipgraft", "torchrun", "python"):
                    yield words[words.index("clipgraft") + 1 :]


def by_page(pages: list[Path]) -> list[Any]:
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages]


every_page = pytest.mark.parametrize("page", by_page(PAGES))


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    found = Registry.discover(allow=PLUGINS, disable=[])
    with use(found):
        yield found


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- generated pages -----------------------------------------------------------------------------------------------


def test_every_hook_and_each_of_its_arguments_is_documented() -> None:
    sections = re.split(r"^### ", (DOCS / "reference" / "hooks.md").read_text("utf-8"), flags=re.MULTILINE)
    by_name = {section.partition("\n")[0]: section for section in sections}
    specs = [f for name, f in vars(hookspecs).items() if name.startswith("clipgraft_")]
    specs += [f for name, f in vars(runhooks.Lifecycle).items() if not name.startswith("_")]
    assert len(specs) > 20
    for function in specs:
        section = by_name[function.__name__]
        assert inspect.cleandoc(function.__doc__).split()[0].strip("`") in section
        for argument in set(inspect.signature(function).parameters) - {"self"}:
            assert f"\n- `{argument}`: " in section, f"{function.__name__}: {argument}"


def test_the_reference_is_up_to_date(generator: ModuleType, tmp_path: Path) -> None:
    fresh = {path.name: path.read_text("utf-8") for path in generator.generate(tmp_path)}
    stored = {path.name: path.read_text("utf-8") for path in (DOCS / "reference").glob("*.md")}
    assert fresh.keys() == stored.keys()
    stale = [name for name in fresh if fresh[name] != stored[name]]
    assert not stale, f"{', '.join(stale)} differ from the code; run python docs/generate.py"


# -- commands ------------------------------------------------------------------------------------------------------


def parse(words: list[str]) -> tuple[str, dict[str, Any]]:
    """Command path and parameters; raises what the command line would raise for wrong usage."""
    root: Any = typer.main.get_command(app)
    context = root.make_context("clipgraft", ["list"])
    found: dict[str, Any] = {"files": []}
    while words and words[0].startswith("-"):
        option = next((p for p in root.params if words[0] in p.opts), None)
        assert option is not None, f"{words[0]} is no global option"
        if option.name == "plugin":
            found["files"].append(words[1])
        words = words[1 if option.is_flag else 2 :]
    if not words:
        return "", found
    name, command, rest = root.resolve_command(context, words)
    while hasattr(command, "list_commands") and rest:
        inner = command.get_command(context, rest[0])
        assert inner is not None, f"{name} has no command {rest[0]}"
        name, command, rest = f"{name} {rest[0]}", inner, rest[1:]
    return name, found | command.make_context(name, rest).params


@pytest.mark.parametrize("page", by_page([page for page in PAGES if any(commands(page))]))
def test_commands_parse_and_name_what_exists(
    page: Path, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options exist, recipes and presets load with their overrides, evaluators and components are registered."""
    monkeypatch.chdir(tmp_path)
    for block in [block for other in (*PAGES, page) for block in blocks(other)]:
        if block.file:
            Path(block.file).parent.mkdir(parents=True, exist_ok=True)
            Path(block.file).write_text(block.text, "utf-8")
    for words in commands(page):
        shown = shlex.join(words)
        try:
            name, given = parse(words)
        except Exception as error:
            pytest.fail(f"clipgraft {shown}: {getattr(error, 'message', error)}")
        found = Registry.discover(allow=PLUGINS, disable=[], files=given["files"]) if given["files"] else registry
        with use(found):
            if name in ("run", "config show") and given.get("recipe"):
                load_recipe(given["recipe"], files=given["config"] or (), overrides=given["set_"] or (), registry=found)
            elif name == "config schema":
                found.get("recipe", given["recipe"])
            elif name == "config diff":
                assert all(found.get("recipe", given[side].partition(":")[0]) for side in "ab")
            elif name in ("eval", "compare"):
                from clipgraft.evaluation.suites import check_requested

                if given["on"] or given["suite"] or name == "eval":
                    check_requested(given["on"] or (), given["suite"], registry=found)
            elif name == "list":
                assert given["what"] in PLURALS, shown
            elif name == "show":
                everything = [r for kind in KINDS for r in found.list(kind)]
                assert [r for r in everything if given["name"] in (r.name, r.component.name)], shown
            elif name == "claims":
                assert all(found.get("claim", claim) for claim in given["names"] or ()), shown
        for file in list(sys.modules):
            if file in {Path(plugin).stem for plugin in given["files"]}:
                del sys.modules[file]


@every_page
def test_commands_in_the_text_exist(page: Path) -> None:
    root: Any = typer.main.get_command(app)
    context = root.make_context("clipgraft", ["list"])
    for text in inline(page):
        match = re.match(r"clipgraft ([a-z]+)((?: .*)?)$", text)
        if not match or "." in match[1]:
            continue
        assert match[1] in root.list_commands(context), text
        _, command, _ = root.resolve_command(context, [match[1]])
        rest = match[2].split()
        if hasattr(command, "list_commands") and rest:
            command = command.get_command(context, rest[0])
            assert command is not None, text
        known = {flag for p in command.params for flag in getattr(p, "opts", ())}
        for flag in (word for word in rest if word.startswith("--")):
            assert flag.strip("[],.") in known, text


def test_sessions_exist() -> None:
    sessions = set(
        re.findall(r"^def (\w+)\(session: nox.Session", (ROOT / "noxfile.py").read_text("utf-8"), re.MULTILINE)
    )
    for page in PAGES:
        for name in re.findall(r'nox -s "?(\w+)', page.read_text("utf-8")):
            assert name in sessions, f"{page.name}: nox -s {name}"


# -- names, files, links -------------------------------------------------------------------------------------------


@every_page
def test_every_component_that_is_mentioned_is_registered(page: Path, registry: Registry) -> None:
    """``plugin/name`` anywhere in a page, unless it goes on as a path or is a folder of that package."""
    known = {r.name for kind in KINDS for r in registry.list(kind)}
    owners = {info.name for info in registry.plugins} | {"anomaly", "video", "merging", "llm"}
    text = re.sub(r"\]\([^)]*\)", "]", page.read_text("utf-8"))
    for match in re.finditer(rf"(?<![\w/.\-])({'|'.join(sorted(owners))})/([a-z][a-z0-9-]*)(?![\w/*])", text):
        folder = (ROOT if match[1] == "core" else ROOT / "plugins") / match[1] / match[2]
        if not folder.exists() and text[match.end() : match.end() + 5] not in (".toml",):
            assert match[0] in known, f"{page.name} mentions {match[0]}, which nothing registers"


@every_page
def test_settings_that_are_mentioned_exist(page: Path, registry: Registry) -> None:
    recipes = [registry.config_class("recipe", r.name) for r in registry.list("recipe")]
    keys = {row.key for cls in recipes if cls for row in describe(cls)}
    keys |= {key.rpartition(".")[0] for key in keys} | {key.split(".", 1)[1] for key in keys if ".train." in key}
    for text in inline(page):
        if re.fullmatch(
            r"(model|data|evaluate|train|latent|generator|clip|denoiser|flow)\.[a-z_.]+(?<!\.py)(?<!\.json)", text
        ):
            assert text in keys, f"{page.name} mentions {text}, which no recipe has"


@every_page
def test_references_have_settings_that_exist(page: Path, registry: Registry) -> None:
    evaluators = {found.name for found in registry.list("evaluator")}  # "core/retrieval?ks=[1]@SRC"
    for name, query in re.findall(r"(?<![\w/])(\w+/[\w-]+)\?([\w=&,.-]+)", page.read_text("utf-8")):
        if name.startswith("plugin/"):
            continue
        cls = registry.config_class("evaluator" if name in evaluators else "dataset", name)
        assert cls is not None
        for key in (part.partition("=")[0] for part in query.split("&")):
            assert key in cls.model_fields, f"{page.name}: {name} has no setting {key}"


def test_pretrained_models_that_are_mentioned_would_open() -> None:
    """Architecture and tag are known to open_clip and belong together; nothing is downloaded."""
    import open_clip

    from clipgraft.encoders.openclip import quickgelu_advice

    found = {m for page in PAGES for m in re.findall(r"open_clip:([A-Z][\w-]*\d[\w-]*)/(\w+)", page.read_text("utf-8"))}
    assert found
    for arch, tag in found:
        assert (arch, tag) in open_clip.list_pretrained(), f"open_clip:{arch}/{tag}"
        assert not quickgelu_advice(arch, tag)


@every_page
def test_files_that_are_mentioned_exist(page: Path) -> None:
    for text in inline(page):
        if re.fullmatch(r"(core|plugins|tests|benchmarks|docs)/[\w./-]+\.(py|md|yaml|toml|json|svg|png)", text):
            assert (ROOT / text).is_file(), f"{page.name} mentions {text}"


def anchors(page: Path) -> set[str]:
    """What headings can be linked to."""
    text = BLOCK.sub("", page.read_text("utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@every_page
def test_links_resolve(page: Path) -> None:
    text = BLOCK.sub("", page.read_text("utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = page if not file else (page.parent / file).resolve()
        assert linked.exists(), f"{page.name}: {target}"
        assert linked.is_relative_to(ROOT)
        if anchor:
            assert anchor in anchors(linked), f"{page.name}: {target}"


@every_page
def test_code_is_well_formed(page: Path) -> None:
    for block in blocks(page):
        if block.language == "python" and "<factory>" not in block.text and page.parent.name != "reference":
            compile(block.text, f"{page.name}:{block.file}", "exec")
        elif block.language == "yaml":
            parse_yaml(block.text, origin=page.name)


@every_page
def test_no_page_has_a_path_of_one_machine_or_a_gap(page: Path) -> None:
    text = page.read_text("utf-8")
    assert not re.search(r"(?<![\w.])/(tmp|work|root|home)/", text)
    assert not re.search(r"\b(TODO|FIXME|TBD|XXX|lorem ipsum)\b", text)


# -- the examples run ----------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a tiny CLIP and photographs of noise, with captions."""
    import torch
    from PIL import Image

    from clipgraft.checkpoint import write_export
    from clipgraft.testing.tiny import tiny_clip

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    write_export(tiny_clip(), Path("clip"))
    noise = torch.randint(0, 256, (8, 40, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rows = ["image,caption"]
    for number, pixels in enumerate(noise):
        file = Path("photos", ("animal", "texture")[number % 2], f"{number}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(file)
        rows.append(f"{file.as_posix()},a photo of {number}")
    Path("pairs.csv").write_text("\n".join(rows) + "\n", "utf-8")
    return tmp_path


def example(page: Path, file: str) -> str:
    """The block of a page that is titled ``file``, or starts with it in a comment."""
    (block,) = [b for b in blocks(page) if b.file == file or b.text.startswith(f"# {file}\n")]
    return block.text


@pytest.mark.parametrize(
    ("page", "file", "setting"),
    [
        (TUTORIAL, "cyclic.py", "losses=[clip, {use: cyclic, cross: 0.5}]"),
        (ROOT / "README.md", "cyclic.py", "losses=[clip, cyclic]"),
        (DOCS / "how-to" / "write-a-plugin.md", "scale.py", "hooks=[scale]"),
    ],
)
def test_the_plugins_of_the_pages_work(here: Path, page: Path, file: str, setting: str) -> None:
    import json

    import clipgraft

    Path(file).write_text(example(page, file), "utf-8")
    assert len(Path(file).read_text("utf-8").splitlines()) <= 30
    found, steps = Registry.discover(allow=[], files=[Path(file)]), 3
    settings = [
        "model.from=clip",
        "data.from=csv:pairs.csv",
        f"train.steps={steps}",
        "train.batch_size=4",
        "train.log_every=1",
        setting,
    ]
    try:
        with use(found):
            result = clipgraft.run("finetune", overrides=settings, out="out", registry=found)
    finally:
        sys.modules.pop(Path(file).stem, None)
    lines = (result.run / "stages" / "00-train" / "metrics.jsonl").read_text("utf-8").splitlines()
    assert len(lines) == steps
    if setting.startswith("losses"):
        values = [v for k, v in json.loads(lines[-1])["terms"].items() if k.startswith("Cyclic")]
        assert values and all(value >= 0 for value in values) and values[0] > 0
    else:
        assert len((result.run / "scale.txt").read_text("utf-8").splitlines()) == steps


def test_the_python_example_of_the_readme_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = [b for b in blocks(ROOT / "README.md") if b.language == "python" and "clipgraft.run(" in b.text]
    assert len([line for line in block.text.splitlines() if line]) <= 10
    with use(Registry.discover(allow=PLUGINS, disable=[])):
        exec(compile(block.text, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("torch.Size([2, ")


def shell(line: str) -> None:
    """Run a line of a shell block with the programs of this interpreter; it must succeed."""
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(line, shell=True, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


FEW = "--set generator.train.steps=4 --set clip.train.steps=2"
"""What makes a run of GenHancer short."""


HOW_TO = (
    "post-train-on-photos",
    "evaluate",
    "compare",
    "data",
    "embed-and-search",
    "open-clip",
    "inspect-parts",
    "segment",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    by_page([TUTORIAL, *(DOCS / "how-to" / f"{n}.md" for n in HOW_TO)]),
)
def test_the_pages_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block in order, with the photographs of the tutorial and fewer steps; installing and the demo left out."""
    pytest.importorskip("skimage")
    monkeypatch.chdir(tmp_path)
    exec(compile(example(TUTORIAL, "photos.py"), "photos.py", "exec"), {})
    if page.stem == "open-clip":
        given = "--set model.from=toyworld/clip --set data.from=folder:photos"
        shell(f"clipgraft run genhancer {given} {FEW} --out runs/photos")
    for block in blocks(page):
        if block.file:
            Path(block.file).write_text(block.text, "utf-8")
        if block.language == "python" and "hookimpl" not in block.text:
            Path("block.py").write_text(block.text, "utf-8")
            shell("python block.py")
        for line in block.text.replace("\\\n", " ").splitlines() if block.language == "bash" else ():
            if line.startswith("pip ") or line.strip() == "clipgraft demo":
                continue
            shell(f"{line} {FEW}" if "run genhancer" in line else line)


def help_pages(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command path, groups included."""
    yield words
    for name, sub in getattr(command, "commands", {}).items():
        yield from help_pages(sub, (*words, name))


def test_every_command_prints_its_help(capsys: pytest.CaptureFixture[str], registry: Registry) -> None:
    for spec in registry.commands():
        for words in help_pages(_command(spec), (spec.name,)):
            with pytest.raises(SystemExit) as ended:
                main([*words, "--help"])
            streams = capsys.readouterr()
            assert (ended.value.code, streams.err) == (0, ""), words
            assert f"clipgraft {' '.join(words)}" in streams.out and "--help" in streams.out


def test_every_setting_says_what_it_is() -> None:
    registry, bare = Registry.discover(), set()
    for registered in (r for kind in KINDS for r in registry.list(kind)):
        config = registry.config_class(registered.kind, registered.name)
        bare |= {f"{registered.name} {row.key}" for row in (describe(config) if config else ()) if not row.description}
    assert not bare
