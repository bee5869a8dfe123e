"""The guard of benchmarks/guard.py on scripts that print what is told: bounds, failures, files, and the real table."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def guard() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))  # where a script finds its neighbours
    try:
        spec = importlib.util.spec_from_file_location("guard_benchmark", BENCHMARKS / "guard.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    """``measures`` prints a ratio of 2 and counts its runs, ``fails`` ends with an error, ``talks`` prints no JSON."""
    told = "import json, sys; open(sys.argv[1], 'a').write('x'); print(json.dumps({'case': {'ratio': 2, 'nan': NAN}}))"
    (tmp_path / "measures.py").write_text(told.replace("NAN", "float('nan')"))
    (tmp_path / "fails.py").write_text("raise SystemExit('the losses differ by 0.3')")
    (tmp_path / "talks.py").write_text("print('hello')")
    (tmp_path / "sleeps.py").write_text("import time; time.sleep(60)")
    return tmp_path


def entry(guard, scripts, *, script="measures", path=("case", "ratio"), bound=2.5, direction="at most", says="a"):
    return guard.Entry(script, (str(scripts / "runs"),), path, bound, direction, says)


def test_ratios_within_their_bounds_are_exit_code_0_and_a_script_runs_once(guard, scripts, capsys):
    known = [entry(guard, scripts), entry(guard, scripts, bound=1.5, direction="at least", says="b")]
    assert guard.main(["--json", "--out", str(scripts / "out.json")], known=known, folder=scripts) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and [row["ratio"] for row in found["entries"]] == [2.0, 2.0]
    assert (scripts / "runs").read_text() == "x"
    assert json.loads((scripts / "out.json").read_text()) == found


@pytest.mark.parametrize(("bound", "direction"), [(1.9, "at most"), (2.1, "at least")])
def test_a_broken_bound_is_exit_code_1(guard, scripts, capsys, bound, direction):
    known = [entry(guard, scripts), entry(guard, scripts, bound=bound, direction=direction, says="worse")]
    assert guard.main([], known=known, folder=scripts) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "measures" in line]
    assert lines[0].endswith("ok") and "worse" in lines[1] and lines[1].endswith("broken")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"script": "fails"}, "fails: ended with 1: the losses differ by 0.3"),
        ({"script": "talks"}, "talks: printed no JSON"),
        ({"script": "absent"}, "absent: ended with 2"),
        ({"path": ("case", "speed")}, "measures: its JSON has no case / speed"),
        ({"path": ("case",)}, "measures: case is no number"),
    ],
)
def test_a_script_without_its_ratio_is_told_and_exit_code_1(guard, scripts, capsys, change, told):
    assert guard.main([], known=[entry(guard, scripts, **change)], folder=scripts) == 1
    assert told in capsys.readouterr().err


def test_a_ratio_that_is_no_number_breaks_any_bound(guard, scripts):
    for direction in ("at most", "at least"):
        known = [entry(guard, scripts, path=("case", "nan"), bound=0, direction=direction)]
        assert guard.main([], known=known, folder=scripts) == 1


def test_a_script_that_hangs_is_ended(guard, scripts, capsys):
    assert guard.main(["--timeout", "0.5"], known=[entry(guard, scripts, script="sleeps")], folder=scripts) == 1
    assert "sleeps: took longer than 0.5 s" in capsys.readouterr().err


def test_named_scripts_alone_run_and_an_unknown_name_is_refused(guard, scripts, capsys):
    known = [entry(guard, scripts), entry(guard, scripts, script="fails")]
    assert guard.main(["measures"], known=known, folder=scripts) == 0
    with pytest.raises(SystemExit):
        guard.main(["nothing"], known=known, folder=scripts)
    assert "no entry for 'nothing'; it has measures, fails" in capsys.readouterr().err


def test_markdown_has_a_line_for_every_entry(guard, scripts, capsys):
    guard.main(["--markdown"], known=[entry(guard, scripts)], folder=scripts)
    header, rule, line = capsys.readouterr().out.strip().splitlines()
    assert header.startswith("| ratio") and rule == "| --- | --: | --: | --: |" and line.count("|") == 5


def test_the_plot_names_every_ratio_and_is_the_same_twice(guard, scripts):
    pytest.importorskip("matplotlib")
    known = [entry(guard, scripts, says="first of all"), entry(guard, scripts, says="second", bound=1.5)]
    files = [scripts / "a.svg", scripts / "b.svg"]
    for file in files:
        guard.main(["--plot", str(file)], known=known, folder=scripts)
    text = files[0].read_text()
    assert "first of all" in text and "second" in text
    assert text == files[1].read_text()


def test_the_table_names_scripts_that_are_there_and_words_that_they_take(guard):
    for known in guard.ENTRIES:
        text = (BENCHMARKS / f"{known.script}.py").read_text("utf-8")
        assert '"--json"' in text
        assert all(f'"{word}"' in text for word in known.words if word.startswith("--"))
