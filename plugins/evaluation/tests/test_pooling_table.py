"""{before, after} x {poolings} of a run: counts, standard errors and McNemar's p, on the terminal and on the page."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from clipgraft.checkpoint import write_export
from clipgraft.errors import InputError
from clipgraft.evaluation import evaluate, records
from clipgraft.evaluation.base import Evaluation
from clipgraft.evaluation.statistics import mcnemar
from clipgraft.execution import run_recipe
from clipgraft.registry import Registry, use
from clipgraft.testing.tiny import tiny_clip
from clipgraft_evaluation.compare import both_of_run
from clipgraft_evaluation.pooling_table import Cell, pooling_tables
from clipgraft_evaluation.report import write_report

PAIRS = 18


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    with use(Registry.discover(allow=("evaluation",))) as registry:
        yield registry


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, minimal pairs in MMVP's layout, the same images with captions."""
    folder = tmp_path_factory.mktemp("world")
    write_export(tiny_clip(0), folder / "clip")
    write_export(tiny_clip(kind="siglip-timm"), folder / "siglip")
    table = [("Question ID", "Type", "Statement")]
    captions = ["image,caption"]
    for number in range(1, 2 * PAIRS + 1):
        kind, text = ("State", "Color")[number > PAIRS], f"a {('red', 'blue')[number % 2]} square number {number}"
        image = folder / "mmvp" / "MLLM_VLM Images" / kind / f"{number}.jpg"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.frombytes("RGB", (24, 20), random.Random(number).randbytes(24 * 20 * 3)).save(image)
        table.append((str(number), kind, text))
        captions.append(f"{image.relative_to(folder)},{text}")
    with (folder / "mmvp" / "Questions.csv").open("w", newline="") as file:
        csv.writer(file).writerows(table)
    (folder / "captions.csv").write_text("\n".join(captions))
    return folder


def train(
    world: Path, registry: Registry, out: Path, *, model: str = "clip", on: str = "evaluation/pairs-grid"
) -> Path:
    settings = {
        "model.from": str(world / model), "data.from": f"csv:{world / 'captions.csv'}", "train.steps": 12,
        "train.batch_size": 12, "train.lr": 3e-3, "train.warmup": 0, "losses": ["core/clip"],
        "evaluate.on": [f"{on}@mmvp:{world / 'mmvp'}"], "evaluate.retention": "none",
    }  # fmt: skip
    return run_recipe("finetune", overrides=settings, out=out, registry=registry).run


@pytest.fixture(scope="module")
def run(world: Path, registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(world, registry, tmp_path_factory.mktemp("runs") / "one")


def test_the_grid_of_a_run_is_that_of_both_models(world: Path, registry: Registry, run: Path) -> None:
    both = both_of_run(str(run))
    (table,) = pooling_tables(both.a, both.b)
    assert [column.pooling for column in table.columns] == ["cls", "official"] and table.n == PAIRS
    name = f"pairs-grid?before={world / 'clip'}@mmvp:{world / 'mmvp'}"
    (alone,) = evaluate(load(run / "export", registry), [name], registry=registry).values()
    (same,) = pooling_tables({}, {"evaluation/pairs-grid": alone})
    assert same.columns == table.columns, "told the base, or measured before the run"
    changed = 0
    for column in table.columns:
        for when, cell in (("before", column.before), ("after", column.after)):
            assert (cell.right, cell.n) == alone.counts[f"{when}/{column.pooling}/total"]
            assert cell.error == pytest.approx((cell.share * (1 - cell.share) / PAIRS) ** 0.5)
            assert cell.mean == alone.metrics[f"{when}/{column.pooling}"]
        assert column.after.right - column.before.right == column.won - column.lost
        assert column.p == mcnemar(column.lost, column.won) == alone.metrics[f"{column.pooling}/p"]
        assert (column.after.sd is not None) == (column.pooling == "official")
        changed += column.lost + column.won
    assert changed, "otherwise nothing was compared"
    log = (run / "log.txt").read_text()
    for column in table.columns:
        counts = f"own/{column.pooling}/total {column.before.right} -> {column.after.right} of {PAIRS}"
        assert counts in log and f"McNemar p = {column.p:.2g}" in log


def load(path: Path, registry: Registry):  # type: ignore[no-untyped-def]
    from clipgraft.encoders import load

    return load(str(path), registry=registry).eval()


def test_the_terminal_and_the_page_show_it(registry: Registry, run: Path) -> None:
    import typer

    from clipgraft_evaluation.compare_command import compare

    app = typer.Typer()
    app.command()(compare)
    both = both_of_run(str(run))
    (table,) = pooling_tables(both.a, both.b)
    done = CliRunner().invoke(app, [str(run)])
    assert done.exit_code == 0, done.output
    first = table.columns[0]
    for text in (f"{table.n} pairs", "class token", "as in the paper", f"{first.lost} lost, {first.won} won"):
        assert text in done.stdout
    assert f"{first.after.right} = {first.after.share:.1%} ± {100 * first.after.error:.1f}" in done.stdout
    found = json.loads(CliRunner().invoke(app, [str(run), "--json"]).stdout)
    assert found["poolings"] == [table.as_dict()] and found["a"].endswith(" before")
    wrong = CliRunner().invoke(app, [str(run), "--on", "pairs-grid"])
    assert isinstance(wrong.exception, InputError) and "name a second one" in str(wrong.exception)
    page = " ".join(write_report(run).read_text("utf-8").split())
    assert "Pairs by pooling" in page and "more than half of the draws" in page
    cell = table.columns[1].after
    assert f"<td>{cell.right}, {100 * cell.share:.1f} % ± {100 * cell.error:.1f}</td>" in page


def test_a_tower_without_class_token_has_one_column(world: Path, registry: Registry, tmp_path: Path) -> None:
    run = train(world, registry, tmp_path / "run", model="siglip")
    both = both_of_run(str(run))
    (table,) = pooling_tables(both.a, both.b)
    assert [column.pooling for column in table.columns] == ["pooled"]
    assert "more than half of the draws" not in write_report(run).read_text("utf-8")


def test_what_is_not_there_makes_no_table(world: Path, registry: Registry, run: Path, tmp_path: Path) -> None:
    both = both_of_run(str(run))
    (name, after), (_, before) = *both.b.items(), *both.a.items()
    assert pooling_tables({}, both.b) == [] and pooling_tables(both.a, {}) == []
    assert pooling_tables(both.a, {name: Evaluation(after.metrics)}) == []
    some = {name: Evaluation(before.metrics, {}, before.samples[:7])}
    assert pooling_tables(some, both.b)[0].n == 7, "of the pairs that both measured"
    assert Cell(35, 135, 0.26).error == pytest.approx(0.0377, abs=5e-5), "3.8 points of MMVP-VLM's 135 pairs"
    with pytest.raises(InputError, match="is no run"):
        both_of_run(str(world))
    records.save(tmp_path / "evaluation" / "before", both.a)
    (tmp_path / "status.json").write_text("{}")
    with pytest.raises(InputError, match="measured nothing after it"):
        both_of_run(str(tmp_path))
