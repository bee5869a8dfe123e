"""The command line in this process: what it prints, where, and which exit code it ends with."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from clipgraft.cli import main
from clipgraft.errors import ClipgraftError, Interrupted
from clipgraft.evaluation import records
from clipgraft.registry import KNOWN_PLUGINS, Registry, use


@dataclass
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Cli]:
    """Runs ``clipgraft ARGS`` with the core's components alone."""
    monkeypatch.setenv("CLIPGRAFT_PLUGINS", "")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setitem(KNOWN_PLUGINS, "sampleknown", "famous")

    def call(*args: object) -> Outcome:
        with pytest.raises(SystemExit) as ended:
            main([str(arg) for arg in args])
        return Outcome(int(ended.value.code or 0), *capsys.readouterr())

    with use(Registry.discover(allow=[])):
        yield call


PLUGIN = """
import typer
from clipgraft.errors import ClipgraftError
from clipgraft.spec import CommandSpec, Component, hookimpl

app = typer.Typer(help="Sample.")

@app.command()
def fail(how: str):
    if how == "bug":
        raise KeyError("lost")
    raise {"work": ClipgraftError("no more\\n disk"), "abort": typer.Abort()}[how]

@hookimpl
def clipgraft_commands():
    return [CommandSpec(name="samplecli", target="samplecli:app", help="A sample.")]

@hookimpl
def clipgraft_heads():
    mine = Component(name="mine", target="samplecli:app", summary="Mine", needs=("absent-package",), paper="Me, 2026")
    return [mine, Component(name="gone", target="samplecli:gone")]
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "samplecli.py"
    path.write_text(PLUGIN)
    yield path
    sys.modules.pop("samplecli", None)


def test_help_lists_the_commands_of_core_and_plugins(cli: Cli, plugin: Path) -> None:
    found = cli("--help")
    assert found.code == 0 and found.err == ""
    for word in ("run", "eval", "export", "list", "show", "config", "plugins", "--debug"):
        assert word in found.out
    assert "samplecli" not in found.out and "samplecli" in cli("--plugin", plugin, "--help").out
    assert "fail" in cli("--plugin", plugin, "samplecli", "--help").out
    empty = cli()
    assert (empty.code, empty.err) == (2, "") and "Usage" in empty.out


def test_version(cli: Cli) -> None:
    import clipgraft

    assert cli("--version").out == f"clipgraft {clipgraft.__version__}\n"


def test_errors_are_one_line_and_an_exit_code(cli: Cli, plugin: Path) -> None:
    def fail(how: str, *options: str) -> Outcome:
        return cli("--plugin", plugin, *options, "samplecli", "fail", how)

    assert (fail("work").code, fail("work").err) == (1, "error: no more disk\n")
    assert fail("abort").code == 1
    bug = fail("bug")
    assert bug.code == 1 and bug.err == "error: KeyError: 'lost'; run again with --debug for the traceback\n"
    debugged = cli("--plugin", plugin, "samplecli", "fail", "bug", "--debug")
    assert "Traceback" in debugged.err and debugged.err.endswith("for the traceback\n") and debugged.code == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["lisst"], "No such command 'lisst'. Did you mean 'list'? See clipgraft --help"),
        (["run", "--sett", "a=1"], "No such option: --sett"),
        (["eval"], "Missing argument 'MODEL'. See clipgraft eval --help"),
        (["config", "sho"], "No such command 'sho'"),
        (["--plugin", "absent.py", "list", "losses"], "--plugin absent.py: no such file"),
        (["list", "lossses"], "unknown kind 'lossses'; did you mean losses"),
        (["show", "lorra"], "unknown name 'lorra'; did you mean core/lora"),
        (["show", "famous"], "pip install clipgraft-sampleknown"),
        (["plugins", "show", "absent"], "unknown plugin 'absent'"),
        (["run"], "name a recipe"),
        (["run", "finetune", "--resume", "x"], "knows its recipe"),
        (["run", "finetune:x"], "unknown core/finetune preset 'x'"),
        (["run", "finetune"], "not set: model.from, data.from; give each with --set"),
        (["run", "finetune", "--config", "absent.yaml"], "can't read absent.yaml"),
        (["config", "show", "finetune", "--set", "train.lr"], "write KEY=VALUE"),
        (["eval", "absent/model", "--on", "zero-shot", "--data", "folder:x"], "unknown model 'absent/model'"),
    ],
)
def test_bad_input_ends_with_2(cli: Cli, args: list[str], message: str) -> None:
    found = cli(*args)
    assert found.code == 2 and found.out == ""
    assert found.err.startswith("error: ") and found.err.count("\n") == 1 and message in found.err


def test_listing(cli: Cli, plugin: Path) -> None:
    assert "core/lora" in cli("list", "grafts").out
    (head,) = [
        row for row in cli("--plugin", plugin, "list", "heads", "--json").json if row["name"] == "samplecli/mine"
    ]
    assert head == {
        "name": "samplecli/mine",
        "kind": "head",
        "plugin": "samplecli",
        "summary": "Mine",
        "paper": "Me, 2026",
        "needs": ["absent-package"],
    }
    for what in ("recipes", "encoders", "heads", "losses", "datasets", "evaluators", "suites", "claims", "run-hooks"):
        assert cli("list", what).code == 0 and isinstance(cli("list", what, "--json").json, list)


def test_show(cli: Cli, plugin: Path) -> None:
    shown = cli("show", "finetune")
    assert "core/finetune (recipe)" in shown.out and "train.batch_size" in shown.out and "required" in shown.out
    (row,) = cli("show", "core/lora", "--json").json
    assert {"key": "rank", "type": "integer", "default": 8}.items() <= row["config"][0].items() and row["presets"] == []
    (off,) = [setting for setting in row["config"] if setting["key"] == "biases"]
    assert off["default"] is False and "false   " in cli("show", "core/lora").out.partition("true | false")[2]
    kinds = {row["kind"] for row in cli("show", "zero-shot", "--json").json}
    assert kinds == {"head", "evaluator"}  # one name, two kinds: both are shown
    assert "needs: absent-package" in cli("--plugin", plugin, "show", "mine").out


def test_plugins(cli: Cli, plugin: Path) -> None:
    (row,) = [row for row in cli("--plugin", plugin, "plugins", "list", "--json").json if row["name"] == "samplecli"]
    assert row["status"] == "ok" and row["components"] == ["samplecli/gone", "samplecli/mine"] and row["error"] == ""
    assert {"name", "distribution", "version", "status", "components", "load_ms", "error", "path"} == row.keys()
    assert "samplecli" in cli("--plugin", plugin, "plugins", "list").out
    shown = cli("--plugin", plugin, "plugins", "show", "samplecli", "--json").json
    assert [offer["name"] for offer in shown["components"]] == ["samplecli/gone", "samplecli/mine"]
    assert "Mine" in cli("--plugin", plugin, "plugins", "show", "samplecli").out
    frozen = cli("--plugin", plugin, "plugins", "freeze").out.splitlines()
    assert frozen[0].startswith("clipgraft==") and frozen[-1] == "# samplecli is a file"


def test_doctor_imports_everything_and_fails_when_something_is_broken(cli: Cli, plugin: Path) -> None:
    healthy = cli("plugins", "doctor")
    assert healthy.code == 0, healthy.out
    ill = cli("--plugin", plugin, "plugins", "doctor")
    assert ill.code == 1 and "samplecli: broken" in ill.out and "AttributeError" in ill.out
    assert "samplecli/mine needs absent-package, which is not installed" in ill.out  # a note, not the reason
    plugin.write_text("raise RuntimeError('early')")
    broken = cli("--plugin", plugin, "plugins", "doctor", "samplecli")
    assert broken.code == 1 and "Traceback" in broken.out and "RuntimeError: early" in broken.out
    assert "core" not in broken.out.split("Traceback")[0]


def test_config_commands(cli: Cli, tmp_path: Path) -> None:
    given = ("--set", "model.from=m", "--set", "data.from=csv:d")
    shown = cli("config", "show", "finetune", *given, "--set", "grafts=[lora]", "--set", "train.lr=1e-3")
    assert shown.code == 0 and "use: core/lora" in shown.out and "lr: 0.001" in shown.out and "rank: 8" in shown.out
    file = tmp_path / "mine.yaml"
    file.write_text(shown.out)
    assert cli("config", "show", "finetune", "--config", file).out == shown.out
    assert cli("config", "show", "finetune", *given, "--json").json["train"]["steps"] == 1000
    assert "optimizer steps" in cli("config", "schema", "finetune").out
    schema = cli("config", "schema", "finetune", "--json").json
    assert schema["type"] == "object" and "from" in schema["$defs"]["ModelConfig"]["properties"]
    differences = cli("config", "diff", "finetune", file, "--json").json
    assert differences["train.lr"] == [1e-5, 1e-3] and differences["model.from"] == ["(not set)", "m"]
    assert set(differences) == {"train.lr", "model.from", "data.from", "grafts"}
    assert "0.001" in cli("config", "diff", "finetune", file).out
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(shown.out)
    assert cli("config", "diff", run, file, "--json").json == {}
    file.write_text("extends: finetune\ntrain: {steps: 7}\n")
    assert cli("config", "diff", "finetune", file, "--json").json == {"train.steps": [1000, 7]}


def test_run_passes_its_options_on_and_prints_the_result(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import clipgraft.execution

    seen: dict[str, Any] = {}

    def fake(recipe: str | None, **options: Any) -> clipgraft.execution.Result:
        print("a library talks")
        seen.update(options, recipe=recipe)
        if options["resume"] is not None:
            raise Interrupted("stopped after step 3; continue with --resume x")
        if options["seed"] == 12:
            raise KeyboardInterrupt
        if options["seed"] == 13:
            raise ClipgraftError("the loss became NaN")
        return clipgraft.execution.Result(tmp_path, tmp_path / "export", "done", 5, {"core/pairs.mean": 0.25}, 1.0)

    monkeypatch.setattr(clipgraft.execution, "run_recipe", fake)
    done = cli("run", "finetune:tiny", "--set", "a=1", "--set", "b=2", "--seed", 4, "--config", "f.yaml", "--json")
    assert done.code == 0 and done.err == "a library talks\n"
    assert done.json == {
        "run": str(tmp_path),
        "export": str(tmp_path / "export"),
        "status": "done",
        "steps": 5,
        "metrics": {"core/pairs.mean": 0.25},
        "forgetting": {},
        "seconds": 1.0,
    }
    assert seen["recipe"] == "finetune:tiny" and list(seen["overrides"]) == ["a=1", "b=2"] and seen["seed"] == 4
    assert list(seen["configs"]) == [Path("f.yaml")] and seen["out"] is None and not seen["dry_run"]
    assert "core/pairs.mean 0.2500" in cli("run", "finetune").out
    assert cli("run", "--resume", tmp_path).code == 130
    stopped = cli("run", "finetune", "--seed", 12)
    assert stopped.code == 130 and stopped.err.endswith("error: interrupted\n") and stopped.out == ""
    monkeypatch.setattr("clipgraft.distributed.rank", lambda: 1)
    assert cli("run", "finetune", "--json").out == "", "one process of several speaks"
    assert (cli("run", "finetune", "--seed", 13).code, cli("run", "finetune", "--seed", 13).out) == (1, "")


def test_export_and_eval_of_a_real_model(cli: Cli, tmp_path: Path) -> None:
    from PIL import Image

    from clipgraft.checkpoint import write_export
    from clipgraft.testing.tiny import tiny_clip

    model = write_export(tiny_clip(), tmp_path / "model")
    copied = cli("export", model, "--out", tmp_path / "copy", "--format", "open_clip", "--json")
    assert copied.code == 0 and (Path(copied.json["export"]) / "open_clip_config.json").is_file()
    for label in ("red", "blue"):
        for k in range(12):
            path = tmp_path / "data" / label / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), label).save(path)
    source = f"folder:{tmp_path / 'data'}"
    args = ("eval", copied.json["export"], "--on", f"zero-shot,linear-probe@{source}", "--data", source)
    found = cli(*args, "--out", tmp_path / "samples", "--json")
    assert found.code == 0, found.err
    assert found.json["model"] == copied.json["export"]
    assert found.json["results"].keys() == {"core/zero-shot", "core/linear-probe"}
    saved = records.read(tmp_path / "samples")["core/zero-shot"]
    assert len(saved.samples) == 24 and saved.metrics == found.json["results"]["core/zero-shot"]
    assert list(saved.intervals["top1"]) == found.json["intervals"]["core/zero-shot"]["top1"]
    (right, n), error = saved.counts["top1"], saved.standard_errors["top1"]
    assert error == found.json["standard_errors"]["core/zero-shot"]["top1"]
    assert error == pytest.approx((right / n * (1 - right / n) / n) ** 0.5)
    assert f"top1 {right / n:.4f} ± {error:.4f} [" in cli(*args).out
    (tmp_path / "mine.yaml").write_text(f"- zero-shot@{source}\n- {{use: linear-probe, data: '{source}'}}\n")
    again = cli("eval", copied.json["export"], "--suite", tmp_path / "mine.yaml", "--json")
    assert again.json["results"] == found.json["results"]
    for wrong, message in (
        (["--suite", "absent"], "unknown suite"),
        ([], "name what to measure"),
        (["--on", "x"], "x"),
    ):
        refused = cli("eval", "no/model", *wrong)
        assert refused.code == 2 and message in refused.err, "before the model is opened"


def test_export_to_open_clip_says_why_it_cannot(cli: Cli, tmp_path: Path) -> None:
    source = """
from clipgraft.spec import hookimpl

@hookimpl
def clipgraft_open(uri):
    if uri == "odd":
        from clipgraft.testing.tiny import tiny_clip

        encoder = tiny_clip()
        encoder.data.model_config = {}
        return encoder
"""
    (tmp_path / "sampleopener.py").write_text(source)
    odd = ("--plugin", tmp_path / "sampleopener.py", "export", "odd", "--out")
    refused = cli(*odd, tmp_path / "theirs", "--format", "open_clip")
    assert refused.code == 2 and "open_clip can't hold" in refused.err and not (tmp_path / "theirs").exists()


def test_a_plugin_adds_a_format_of_export(cli: Cli, tmp_path: Path) -> None:
    source = """
from clipgraft.spec import Component, hookimpl

@hookimpl
def clipgraft_exporters():
    return [Component(name="plain-text", target="sampleformat:write")]

def write(model, out, *, registry):
    print("noise of a library")
    out.mkdir()
    (out / "model.txt").write_text(model)
    return {"export": str(out), "bytes": len(model)}

import sys
sys.modules["sampleformat"] = sys.modules[__name__]
"""
    (tmp_path / "sampleformat.py").write_text(source)
    args = ("--plugin", tmp_path / "sampleformat.py", "export", "any/model", "--out", tmp_path / "written")
    found = cli(*args, "--format", "plain-text", "--json")
    assert found.json == {"model": "any/model", "export": str(tmp_path / "written"), "bytes": 9}
    assert (tmp_path / "written" / "model.txt").read_text() == "any/model"
    unknown = cli(*args, "--format", "onxn")
    assert unknown.code == 2 and "onxn" in unknown.err


def test_a_command_of_a_plugin_that_is_not_in_use_says_what_to_do(cli: Cli) -> None:
    for words in (["demo"], ["claims"], ["embed", "x"], ["anomaly", "predict"]):
        missing = cli(*words)
        assert missing.code == 2 and missing.err.startswith(f"error: clipgraft {words[0]} is not there: ")
        assert "pip install clipgraft-" in missing.err or "plugins doctor" in missing.err
    assert "No such command" in cli("dema").err
