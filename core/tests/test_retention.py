"""What a run costs: measured before and after it, compared, and never worth more than the training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from clipgraft import retention
from clipgraft.checkpoint import write_export
from clipgraft.config.schema import EvaluateConfig, RunConfig
from clipgraft.errors import InputError
from clipgraft.evaluation import comparison, records, suites
from clipgraft.execution import run_recipe
from clipgraft.finetune import FinetuneConfig
from clipgraft.registry import Registry
from clipgraft.runner import Run
from clipgraft.testing.tiny import tiny_clip

PLUGIN = """
from clipgraft.spec import Component, hookimpl

WHERE = {where!r}


def retention(encoder):
    assert encoder.text is not None
    return ["zero-shot@folder:" + WHERE]


def some(encoder):
    return ["zero-shot@folder:" + WHERE, "core/retrieval@csv:pairs.csv", "absent/knn@folder:" + WHERE]


def nothing(encoder):
    return []


@hookimpl
def clipgraft_suites():
    return [Component(name=name, target="{stem}:" + target) for name, target in {offers!r}]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A tiny CLIP, captioned pictures, and pictures in class folders."""
    folder = tmp_path_factory.mktemp("world")
    write_export(tiny_clip(), folder / "clip")
    g = torch.Generator().manual_seed(0)
    rows = ["image,caption"]
    for i in range(32):
        pixels = torch.randint(0, 256, (40, 40, 3), dtype=torch.uint8, generator=g)
        file = folder / "classes" / ("red", "green", "blue")[i % 3] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(file)
        rows.append(f"{file.relative_to(folder)},a picture of thing{i}")
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def offering(world):
    """A registry with plugin files that offer suites, by the file's name: one path each, modules are imported once."""
    made: dict[str, Path] = {}

    def build(**plugins: list[tuple[str, str]]) -> Registry:
        for stem, offers in plugins.items():
            if stem not in made:
                made[stem] = world / f"{stem}.py"
                made[stem].write_text(PLUGIN.format(where=str(world / "classes"), stem=stem, offers=offers))
        return Registry.discover(allow=[], files=[made[stem] for stem in plugins])

    return build


@pytest.fixture
def keeper(offering) -> Registry:
    return offering(keeper=[("retention", "retention"), ("empty", "nothing")])


def settings(world: Path, **more: object) -> dict[str, object]:
    base = {"model.from": str(world / "clip"), "data.from": f"csv:{world / 'pairs.csv'}", "train.steps": 2}
    return {**base, "train.batch_size": 8, "train.warmup": 0, "train.lr": 1e-3, **more}


def test_both_measurements_the_tests_and_the_card(world, tmp_path, keeper) -> None:
    result = run_recipe("finetune", overrides=settings(world), out=tmp_path / "run", registry=keeper)
    assert result.metrics == {}, "evaluate.on is another matter"
    folder = result.run / "evaluation"
    before, after = (records.read(folder / f"retention-{when}") for when in ("before", "after"))
    rows = comparison.compare(before, after)
    assert retention.read(result.run) == rows and {r.name for r in rows} == set(result.forgetting)
    top1 = result.forgetting["core/zero-shot.top1"]
    assert top1.keys() == {"before", "after", "p", "verdict"} and result.as_dict()["forgetting"] == result.forgetting
    stored = json.loads((result.run / "retention.json").read_text())
    assert stored["before"]["core/zero-shot"]["top1"] == top1["before"]
    assert stored["after"]["core/zero-shot"]["top1"] == top1["after"]
    card = (result.export / "README.md").read_text()
    assert f"| core/zero-shot.top1 | {top1['before']:.4f} | {top1['after']:.4f} |" in card
    assert "Nothing was measured" not in card and "forgetting: " in (result.run / "log.txt").read_text()


def test_evaluators_of_plugins_that_are_not_in_use_are_left_out(offering) -> None:
    registry = offering(careful=[("retention", "some")])
    nodes = suites.open_suite("retention", tiny_clip(), registry=registry)
    assert [node.use for node in nodes] == ["zero-shot", "core/retrieval"]


def test_it_changes_no_weight_and_can_be_switched_off(world, tmp_path, keeper) -> None:
    weights = []
    for name, wanted in (("auto", "auto"), ("none", "none")):
        changes = settings(world, **{"evaluate.retention": wanted})
        result = run_recipe("finetune", overrides=changes, out=tmp_path / name, registry=keeper)
        weights.append((result.export / "open_clip_model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert result.forgetting == {} and not (result.run / "retention.json").exists()
    assert not (result.run / "evaluation").exists()


def test_a_resumed_run_measures_nothing_twice(world, tmp_path, keeper, monkeypatch) -> None:
    measured, original = [], Run.evaluate

    def counted(self, encoder, nodes):
        measured.append(encoder)
        return original(self, encoder, nodes)

    monkeypatch.setattr(Run, "evaluate", counted)
    with monkeypatch.context() as patch:
        patch.setattr("clipgraft.execution._run_stage", lambda run, plan: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_recipe("finetune", overrides=settings(world), out=tmp_path / "run", registry=keeper)
    assert len(measured) == 1 and not (tmp_path / "run/forgetting.json").exists()
    first = run_recipe(resume=tmp_path / "run", registry=keeper)
    assert len(measured) == 2 and first.forgetting
    assert run_recipe(resume=tmp_path / "run", registry=keeper).forgetting == first.forgetting
    assert len(measured) == 2


def test_auto_needs_exactly_one_offer_and_says_why_not(world, tmp_path, offering, keeper) -> None:
    for name, registry, why in (
        ("nobody", Registry.discover(allow=[]), "no plugin in use offers a suite named retention"),
        ("two", offering(keeper=[], rival=[("retention", "retention")]), "keeper/retention and rival/retention"),
        ("hollow", offering(hollow=[("retention", "nothing")]), "suite hollow/retention has nothing to measure"),
    ):
        result = run_recipe("finetune", overrides=settings(world), out=tmp_path / name, registry=registry)
        (line,) = [x for x in (result.run / "log.txt").read_text().splitlines() if "evaluate.retention" in x]
        assert "forgetting is not measured" in line and why in line and result.forgetting == {}


@pytest.mark.parametrize(("wanted", "message"), [
    ("absent", "unknown suite 'absent'"),
    ("empty", "has nothing to measure on"),
    ("absent.yaml", "can't read"),
    ([{"use": "zero-shot", "data": "folder:nowhere"}], "evaluate.retention: .*nowhere"),
    (["no-such@folder:nowhere"], "evaluate.retention.0: unknown evaluator 'no-such'"),
    (5, "evaluate.retention"),
])  # fmt: skip
def test_what_was_named_and_fails_is_bad_input_before_any_training(world, tmp_path, keeper, wanted, message) -> None:
    with pytest.raises(InputError, match=message):
        run_recipe(
            "finetune", overrides=settings(world, **{"evaluate.retention": wanted}), out=tmp_path / "r", registry=keeper
        )
    assert not (tmp_path / "r" / "stages").exists()


def test_lists_and_files_measure_what_they_say(world, tmp_path, keeper) -> None:
    classes, pairs = f"folder:{world / 'classes'}", f"csv:{world / 'pairs.csv'}"
    file = tmp_path / "mine.yaml"
    file.write_text(f"- zero-shot@{classes}\n- {{use: retrieval, data: '{pairs}', ks: [2]}}\n")
    changes = settings(world, **{"evaluate.retention": str(file)})
    result = run_recipe("finetune", overrides=changes, out=tmp_path / "file", registry=keeper)
    assert "core/zero-shot.top1" in result.forgetting and "core/retrieval.text_to_image_r2" in result.forgetting
    changes = settings(world, **{"evaluate.retention": ["linear-probe"], "evaluate.data": classes})
    result = run_recipe("finetune", overrides=changes, out=tmp_path / "list", registry=keeper)
    assert {name.partition(".")[0] for name in result.forgetting} == {"core/linear-probe"}
    assert "linear-probe" in (result.run / "config.yaml").read_text()


@pytest.mark.parametrize(("text", "message"), [
    ("zero-shot", "expected a list"),
    ("[]", "expected a list"),
    ("- 3", "3 is no evaluator; write NAME@SRC"),
    ("- {data: x}", "is no evaluator"),
])  # fmt: skip
def test_a_suite_file_that_is_none_is_refused(tmp_path, text, message) -> None:
    (tmp_path / "s.yaml").write_text(text + "\n")
    with pytest.raises(InputError, match=message):
        suites.read_file(tmp_path / "s.yaml")


def test_failing_after_the_training_costs_one_line(world, tmp_path, keeper, monkeypatch) -> None:
    original, calls = Run.evaluate, []

    def once(self, encoder, nodes):
        calls.append(nodes)
        if len(calls) > 1:
            raise RuntimeError("the disk is gone")
        return original(self, encoder, nodes)

    monkeypatch.setattr(Run, "evaluate", once)
    result = run_recipe("finetune", overrides=settings(world), out=tmp_path / "run", registry=keeper)
    assert result.status == "done" and result.export.exists() and result.forgetting == {}
    assert "what was forgotten is not known: RuntimeError: the disk is gone" in (result.run / "log.txt").read_text()


def test_auto_that_fails_before_is_a_line_and_is_not_tried_again(world, tmp_path, keeper, monkeypatch) -> None:
    monkeypatch.setattr(Run, "evaluate", lambda *_: 1 / 0)
    result = run_recipe("finetune", overrides=settings(world), out=tmp_path / "run", registry=keeper)
    again = run_recipe(resume=tmp_path / "run", registry=keeper)
    assert result.forgetting == again.forgetting == {}
    assert (result.run / "log.txt").read_text().count("forgetting is not measured: ZeroDivisionError") == 1


def test_only_recipes_that_train_are_measured_unasked() -> None:
    common = {"model": {"from": "m"}, "data": {"from": "d"}}
    train = {"steps": 1, "batch_size": 1, "lr": 1.0}
    assert not retention.trains(RunConfig.model_validate(common))
    assert retention.trains(FinetuneConfig.model_validate({**common, "losses": ["clip"], "train": train}))


def test_names_with_data_are_short_for_nodes() -> None:
    config = EvaluateConfig.model_validate({"on": ["a?k=1e-1@plugin/data?x=1", "b"], "retention": ["c@d"]})
    assert [(node.use, node.data) for node in (*config.on, *config.retention)] == [
        ("a", "plugin/data?x=1"), ("b", None), ("c", "d"),
    ]  # fmt: skip
    assert config.on[0].settings == {"k": 0.1}
    with pytest.raises(InputError, match="'k' is no setting"):
        EvaluateConfig.model_validate({"on": ["a?k@b"]})
