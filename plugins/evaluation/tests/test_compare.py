"""``clipgraft compare`` from the outside: models, folders, runs, suites."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from clipgraft.checkpoint import write_export
from clipgraft.errors import InputError
from clipgraft.evaluation import evaluate, records
from clipgraft.evaluation.base import Evaluation
from clipgraft.evaluation.comparison import compare as core_compare
from clipgraft.evaluation.statistics import mcnemar
from clipgraft.registry import Registry, use
from clipgraft.testing.tiny import tiny_clip
from clipgraft_evaluation.compare import Row, compare, measure_both, results_folder

REGISTRY = Registry.discover(allow=("evaluation",))
Compare = Callable[..., SimpleNamespace]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models and 36 pictures in three class folders."""
    folder = tmp_path_factory.mktemp("world")
    write_export(tiny_clip(0), folder / "one")
    write_export(tiny_clip(1), folder / "two")
    g = torch.Generator().manual_seed(0)
    for i in range(36):
        file = folder / "pictures" / ("red", "green", "blue")[i % 3] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (40, 40, 3), dtype=torch.uint8, generator=g)
        Image.fromarray(pixels.numpy()).save(file)
    return folder


@pytest.fixture
def run() -> Compare:
    """The command in this process: exit code, stdout, stderr, JSON."""
    import typer

    from clipgraft_evaluation.compare_command import compare as command

    app = typer.Typer()
    app.command()(command)

    def call(*words: object) -> SimpleNamespace:
        with use(REGISTRY):
            done = CliRunner().invoke(app, [str(word) for word in words])
        text = done.stdout
        made = json.loads(text) if "--json" in words and done.exit_code == 0 else None
        return SimpleNamespace(code=done.exit_code, out=text, error=done.exception, json=made)

    return call


def on(world: Path) -> str:
    return f"zero-shot@folder:{world / 'pictures'}"


def test_two_models_and_their_saved_results_give_the_same_rows(world: Path, tmp_path: Path, run: Compare) -> None:
    live = run(world / "one", world / "two", "--on", on(world), "--out", tmp_path / "out", "--json")
    assert live.code == 0 and live.json.keys() == {"a", "b", "alpha", "rows"}
    assert json.loads((tmp_path / "out/comparison.json").read_text()) == live.json
    saved = run(tmp_path / "out/a", tmp_path / "out/b", "--json")
    assert saved.json["rows"] == live.json["rows"]
    mixed = run(tmp_path / "out/a", world / "two", "--on", on(world), "--json")
    assert mixed.json["rows"] == live.json["rows"]
    top1 = next(row for row in live.json["rows"] if row["metric"] == "top1")
    wanted = "evaluator metric a b difference low high p p_adjusted test verdict n"
    assert top1.keys() == set(wanted.split())
    one, two = (records.read(tmp_path / "out" / side)["core/zero-shot"].samples for side in "ab")
    lost = sum(x["top1"] and not y["top1"] for x, y in zip(one, two, strict=True))
    won = sum(y["top1"] and not x["top1"] for x, y in zip(one, two, strict=True))
    assert lost + won > 0 and top1["p"] == mcnemar(lost, won) and top1["n"] == 36


def test_a_model_against_itself(world: Path, run: Compare) -> None:
    found = run(world / "one", world / "one", "--on", on(world), "--json").json["rows"]
    assert found and {(row["p"], row["difference"], row["verdict"]) for row in found} == {(1.0, 0.0, "cannot tell")}


def test_verdicts_know_what_is_less_and_embeddings_stay_with_their_model(world: Path, run: Compare) -> None:
    names = ",".join(f"{name}@folder:{world / 'pictures'}" for name in ("calibration", "geometry"))
    rows = run(world / "one", world / "two", "--on", names, "--json").json["rows"]
    found = {row["metric"]: row for row in rows}
    assert found["modality_gap"]["difference"] == pytest.approx(found["modality_gap"]["b"] - found["modality_gap"]["a"])
    assert found["modality_gap"]["difference"] != 0 and found["modality_gap"]["p"] is not None
    less = {"modality_gap", "unmatched_cosine", "alignment", "uniformity_images", "uniformity_texts", "ece", "brier"}
    judged = [row for row in rows if row["verdict"] in ("better", "worse") and row["metric"] in less]
    assert judged, "two random models differ in geometry"
    assert all((row["difference"] < 0) == (row["verdict"] == "better") for row in judged)


def test_the_table_says_what_it_compares(world: Path, tmp_path: Path, run: Compare) -> None:
    records.save(tmp_path / "a", {"e": answers(range(40), 60), "alone": answers(range(3), 9)})
    records.save(tmp_path / "b", {"e": answers(range(9, 40), 80)})
    text = run(tmp_path / "a", tmp_path / "b").out
    assert f"A  {tmp_path / 'a'}" in text and "e: 60 samples are on both sides, of 60 and 80" in text
    assert "e (60 samples)" in text and "worse" in text and "p adjusted for 1 tests (Holm)" in text
    worse, cannot = (run(tmp_path / "a", tmp_path / "b", "--alpha", alpha, "--json").json for alpha in (0.05, 1e-9))
    assert [d["rows"][0]["verdict"] for d in (worse, cannot)] == ["worse", "cannot tell"]


def test_runs_stand_for_what_they_measured_after(world: Path, tmp_path: Path, run: Compare) -> None:
    made = tmp_path / "run"
    for when, right in (("before", range(5)), ("after", range(25))):
        records.save(made / "evaluation" / when, {"core/zero-shot": answers(right, 30)})
    (made / "config.yaml").write_text("seed: 0\n")
    (made / "status.json").write_text("{}")
    assert results_folder(str(made)) == made / "evaluation/after"
    (row,) = run(made / "evaluation/before", made, "--json").json["rows"]
    assert (row["a"], row["b"], row["verdict"]) == (5 / 30, 25 / 30, "better")
    (made / "evaluation/after" / records.SUMMARY).unlink()
    with pytest.raises(InputError, match=r"measured nothing after it; compare its model, .*export"):
        results_folder(str(made))
    assert results_folder(str(world / "one")) is None and results_folder("open_clip:ViT-B-32") is None


def test_a_file_of_evaluators_is_a_suite(world: Path, tmp_path: Path, run: Compare) -> None:
    (tmp_path / "mine.yaml").write_text(f"- {on(world)}\n- linear-probe@folder:{world / 'pictures'}\n")
    rows = run(world / "one", world / "two", "--suite", tmp_path / "mine.yaml", "--json").json["rows"]
    assert {row["evaluator"] for row in rows} == {"core/zero-shot", "core/linear-probe"}


def test_a_suite_is_cut_to_what_it_has_for_both(world: Path, tmp_path: Path) -> None:
    image_only = tiny_clip(2)
    image_only.text, image_only.data.tokenizer = None, None
    plugin = tmp_path / "fitting.py"
    plugin.write_text(f"""
from clipgraft.spec import Component, hookimpl

def both(encoder):
    return ["linear-probe@folder:{world / "pictures"}", *texts(encoder)]

def texts(encoder):
    return [("zero-shot" if encoder.text else "linear-probe?l2=1") + "@folder:{world / "pictures"}"]

def blind():
    from clipgraft.testing.tiny import tiny_clip
    encoder = tiny_clip(2)
    encoder.text = encoder.data.tokenizer = None
    return encoder

@hookimpl
def clipgraft_suites():
    return [Component(name=name, target="fitting:" + name) for name in ("both", "texts")]

@hookimpl
def clipgraft_encoders():
    return [Component(name="blind", target="fitting:blind")]
""")
    registry = Registry.discover(allow=(), files=[plugin])
    with use(registry):
        found = measure_both(str(world / "one"), "fitting/blind", suite="both", registry=registry)
        assert found.a.keys() == found.b.keys() == {"core/linear-probe"}
        with pytest.raises(InputError, match="measures different things on"):
            measure_both(str(world / "one"), "fitting/blind", suite="texts", registry=registry)


@pytest.mark.parametrize(("words", "message"), [
    (("A", "B"), "name what to measure: --on NAME@SRC"),
    (("A", "B", "--suite", "absent"), "unknown suite 'absent'"),
    (("A", "B", "--on", "absent"), "unknown evaluator 'absent'"),
    (("A", "B", "--alpha", "1"), "--alpha is 1.0"),
    (("saved", "saved", "--on", "zero-shot"), "both sides are results already"),
    (("saved", "savde"), "savde is no folder of clipgraft eval --out"),
    (("saved", "other"), "share no evaluator: x against y"),
    (("saved", "moved"), "x: the two results share no sample"),
])  # fmt: skip
def test_bad_input_is_one_line_before_any_model_is_opened(
    tmp_path: Path, run: Compare, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    records.save(Path("saved"), {"x": answers(range(2), 4)})
    records.save(Path("other"), {"y": answers(range(2), 4)})
    records.save(Path("moved"), {"x": answers(range(2), 4, prefix="t")})
    failed = run(*words)
    assert isinstance(failed.error, InputError) and message in str(failed.error) and "\n" not in str(failed.error)


def test_it_is_the_cores_comparison_and_a_command_of_this_plugin(world: Path) -> None:
    assert compare is core_compare and Row.__module__ == "clipgraft.evaluation.comparison"
    command = [sys.executable, "-m", "clipgraft", "compare", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env={"CLIPGRAFT_PLUGINS": "evaluation", "PATH": ""})
    assert done.returncode == 0 and "--suite" in done.stdout and "paired tests" in done.stdout
    encoder = tiny_clip()
    found = evaluate(encoder, [on(world)], registry=REGISTRY)
    assert {row.verdict for row in compare(found, found)} == {"cannot tell"}


def answers(right: range, n: int, *, prefix: str = "s") -> Evaluation:
    from clipgraft.evaluation.statistics import Share

    samples = tuple({"id": f"{prefix}{k}", "right": k in right} for k in range(n))
    return Evaluation({"top1": len(right) / n}, {}, samples, {"top1": Share("right")})
