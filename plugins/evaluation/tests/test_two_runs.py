"""Two runs on one page: what can be compared, what is refused, and what differs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from clipgraft.errors import InputError
from clipgraft.evaluation import records
from clipgraft.evaluation.base import Evaluation
from clipgraft.evaluation.statistics import Share, intervals
from clipgraft_evaluation.figures import curve, panels, svg_text
from clipgraft_evaluation.page import flat
from clipgraft_evaluation.report_command import report
from clipgraft_evaluation.two_runs import write_comparison


@pytest.fixture
def other(run_dir: Path) -> Path:
    """A second run with another seed, plugin version and measurements: p0 to p4 are right and p20 is."""
    path = run_dir.parent / "sharper-2"
    shutil.rmtree(run_dir / "stages/00-generator")
    shutil.copytree(run_dir, path)
    config = path / "config.yaml"
    config.write_text(config.read_text().replace("seed: 7", "seed: 8\nnoise:\n  sigma: 0.5"))
    (path / "plugins.json").write_text(json.dumps([{"name": "squares", "distribution": "cg", "version": "0.2"}]))
    (path / "env.json").write_text(json.dumps({"python": "3.11.9", "threads": 2, "versions": {"torch": "2.15.0"}}))
    pairs(path, right={*range(5), 20})
    return path


def pairs(run: Path, *, right: set[int], prefix: str = "p") -> None:
    """Let a run have told these pairs apart after it."""
    rows = [{"id": f"{prefix}{i}", "pattern": "colour", "correct": i in right} for i in range(30)]
    told = {"mean": Share("correct")}
    records.save(run / "evaluation/after", {"core/pairs": Evaluation({}, {}, tuple(rows), told, intervals(told, rows))})
    found = json.loads((run / "evaluations.json").read_text())
    found["after"]["core/pairs"] = {"mean": len(right) / 30}
    (run / "evaluations.json").write_text(json.dumps(found))


def plain(path: Path) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", path.read_text("utf-8").partition("</style>")[2]).split())


def test_the_page_says_which_is_better_and_what_differs(run_dir: Path, other: Path, squares: object) -> None:
    path = write_comparison(run_dir, other)
    assert path == other / "against-sharper-1.html"
    text, words = path.read_text("utf-8"), plain(path)
    heads = re.findall(r'<h2 id="h-([^"]+)">', text)
    assert heads == ["measured", "pairs", "training", "config", "environment"]
    assert re.search(r"mean 0\.333 \[[^]]+] 0\.200 \[[^]]+] −0\.133 .* cannot tell p = 0\.22", words)
    assert "10 of 30 right by A, 6 by B: 1 by B alone, 5 by A alone" in words
    assert re.search(r"seed 7 8 .*noise\.sigma not set 0\.5", words)
    assert "threads 1 2" in words and "plugin squares clipgraft-squares 0.1 cg 0.2" in words
    assert "python 3.11.9" not in words and "Every setting is the same" not in words


def test_curves_of_both_are_in_one_figure(run_dir: Path, other: Path, squares: object) -> None:
    text = write_comparison(run_dir, other).read_text("utf-8")
    labels = re.findall(r'<svg role="img" aria-label="([^"]+)"', text)
    assert len(labels) == 5
    assert labels[0] == "loss over 100 steps, A: from 0.408 to 0.014; B: from 0.408 to 0.014"
    assert len(set(re.findall(r'\bid="([^"]+)"', text))) == len(re.findall(r'\bid="([^"]+)"', text))


def test_the_gallery_names_the_runs(run_dir: Path, other: Path, squares: object) -> None:
    words = plain(write_comparison(run_dir, other))
    assert "Told apart by B alone 1 of 1" in words and "Told apart by A alone 5 of 5" in words


def test_equal_runs_say_so(run_dir: Path, other: Path, squares: object, tmp_path: Path) -> None:
    shutil.copytree(run_dir, tmp_path / "copy")
    words = plain(write_comparison(run_dir, tmp_path / "copy", tmp_path / "deep/page.html"))
    assert "Every setting is the same" in words and "Versions, hardware and plugins are the same" in words
    assert "Both tell the same pairs apart" in words


def test_measurements_on_other_data_are_not_compared(run_dir: Path, other: Path, squares: object) -> None:
    config = other / "config.yaml"
    config.write_text(config.read_text().replace("squares/other?split=test", "squares/harder"))
    words = plain(write_comparison(run_dir, other))
    assert (
        "core/zero-shot A measured it on squares/other?split=test, B on squares/harder; they share no sample" in words
    )
    assert "core/zero-shot on" not in words and "core/pairs on squares/pairs" in words
    pairs(other, right={1}, prefix="q")
    assert "core/pairs the records of the two share no sample" in plain(write_comparison(run_dir, other))


def change(run: Path, found: Mapping[str, Any]) -> None:
    (run / "evaluations.json").write_text(json.dumps(found))
    shutil.rmtree(run / "evaluation")


def test_what_one_alone_measured_is_named(run_dir: Path, other: Path, squares: object) -> None:
    change(other, {"after": {"core/zero-shot": {"top1": 0.9}, "core/retrieval": {"r1": 0.5}}})
    words = plain(write_comparison(run_dir, other))
    assert "Measured by A alone core/pairs" in words and "Measured by B alone core/retrieval" in words
    assert "top1 0.744 0.900 +0.156" in words


def test_settings_are_shown_as_they_are_written() -> None:
    given = {"losses": [{"use": "core/clip"}, {"use": "x/y", "parts": [1, 2]}], "train": {"lr": 0.1, "ema": None}}
    assert dict(flat(given, by=".")) == {
        "losses": "[{use: core/clip}, {use: x/y, parts: [1, 2]}]",
        "train.lr": "0.1",
    }


def test_steps_are_whole_numbers() -> None:
    figure, (axis,) = panels(1, width=230, height=150)
    curve(axis, [10.0, 20.0], [1.0, 2.0], title="loss")
    svg_text(figure)
    assert all(float(tick) == int(tick) for tick in axis.get_xticks())


def test_runs_without_anything_in_common_are_refused(run_dir: Path, other: Path) -> None:
    change(other, {"after": {"core/retrieval": {"r1": 0.5}}})
    shutil.rmtree(other / "stages")
    with pytest.raises(InputError, match=r"nothing in common: A measured core/zero-shot, core/pairs and trained 01"):
        write_comparison(run_dir, other)


def test_what_is_no_run_and_one_run_twice_are_refused(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="are the same run; give another one, or one alone"):
        write_comparison(run_dir, run_dir.parent / "." / run_dir.name)
    with pytest.raises(InputError, match=r"no run directory \(it has no config.yaml\)"):
        write_comparison(run_dir, tmp_path)


def test_the_command_takes_one_run_or_two(run_dir: Path, other: Path, squares: object, tmp_path: Path) -> None:
    command = typer.Typer()
    command.command()(report)
    done = CliRunner().invoke(command, [str(run_dir), str(other), "--out", str(tmp_path / "both.html")])
    assert done.exit_code == 0 and done.stdout.strip().splitlines()[-1] == str(tmp_path / "both.html")
    assert (tmp_path / "both.html").is_file()
