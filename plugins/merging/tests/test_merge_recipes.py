"""The recipes that fine-tune and merge: what they make, how they stop and go on, and what they refuse."""

import json
import os
import signal

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from clipgraft.checkpoint import open_export, write_export
from clipgraft.errors import InputError, Interrupted
from clipgraft.execution import run_recipe
from clipgraft.testing.tiny import tiny_clip
from clipgraft_merging.opcm.state import read_state
from clipgraft_merging.recipes_merge.matrix import summary
from clipgraft_merging.recipes_merge.tuning import ClassesStage
from clipgraft_merging.task_arithmetic.arithmetic import TaskArithmetic
from clipgraft_merging.ties.merger import Ties
from clipgraft_merging.weights.checkpoints import open_checkpoint
from clipgraft_merging.weights.engine import merge_state, open_inputs

torch.set_num_threads(1)
WEIGHTS = "open_clip_model.safetensors"
SHADES = {"red": (200, 40, 40), "blue": (40, 40, 200), "green": (40, 200, 40)}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base and pictures: two tasks of two colours each."""
    folder = tmp_path_factory.mktemp("recipes")
    write_export(tiny_clip(), folder / "base")
    for task, kinds in (("one", ("red", "blue")), ("two", ("green", "blue"))):
        for kind in kinds:
            (folder / task / kind).mkdir(parents=True)
            for k in range(6):
                shade = tuple(min(255, c + 5 * k) for c in SHADES[kind])
                Image.new("RGB", (32, 32), shade).save(folder / task / kind / f"{k}.png")
    return folder


def settings(place, **more):
    train = {"steps": 3, "batch_size": 4, "lr": 1e-3}
    common = {"model": {"from": str(place / "base")}, "train": train, "evaluate": {"retention": "none"}}
    return {**common, "data": {"from": f"folder:{place / 'one'}"}, **more}


def run(name, out, values, **more):
    return run_recipe(name, overrides=values, out=out, **more)


def weights(export):
    return load_file(export / WEIGHTS)


def interrupt_at(monkeypatch, stage, step):
    """Ctrl-C during one step of one stage."""

    def after_update(self, at):
        if self.name == stage and at == step:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(ClassesStage, "after_update", after_update)


INGREDIENTS = [{"order": 0}, {"order": 1, "lr": 2e-3}]


def soup(place, **more):
    judge = {"data": f"folder:{place / 'two'}"}
    return settings(place, **{"ingredients": INGREDIENTS, "judge": judge, "soup": "uniform", **more})


def test_soup_is_the_mean_of_its_fine_tunes_which_differ(place, tmp_path):
    on = [{"use": "merging/ingredients", "data": f"folder:{place / 'two'}"}]
    values = soup(place)
    values["evaluate"] = {"retention": "none", "on": on}
    done = run("merging/soup", tmp_path / "run", values)
    base = weights(place / "base")
    parts = [weights(tmp_path / "run" / "stages" / f"0{k - 1}-ingredient-{k}" / "result" / "encoder") for k in (1, 2)]
    made = weights(done.export)
    moved = [k for k in base if not torch.equal(parts[0][k], base[k])]
    assert moved and all(k.startswith("visual.") for k in moved)  # words stay as they are
    assert any(not torch.equal(parts[0][k], parts[1][k]) for k in moved)
    for key, value in made.items():
        assert torch.allclose(value, (parts[0][key] + parts[1][key]) / 2, atol=1e-6)
    m = {k.partition(".")[2]: v for k, v in done.metrics.items()}
    assert m["over_mean"] == pytest.approx(m["top1"] - m["mean"]) and m["best"] >= m["mean"] >= m["worst"]
    before = json.loads((tmp_path / "run" / "evaluations.json").read_text())["before"]["merging/ingredients"]
    assert before["over_mean"] == before["over_chosen"] == 0
    lineage = open_export(done.export).data.origin.lineage
    assert [entry.get("merge") for entry in lineage] == ["merging/soup"]


def test_soup_of_given_models_greedy_and_best(place, tmp_path):
    run("merging/soup", tmp_path / "first", soup(place))
    models = [str(tmp_path / "first" / "stages" / f"0{k - 1}-ingredient-{k}" / "result" / "encoder") for k in (1, 2)]
    values = {**soup(place), "ingredients": models}
    for kind in ("greedy", "best"):
        done = run("merging/soup", tmp_path / kind, {**values, "soup": kind})
        told = json.loads((tmp_path / kind / "stages" / "00-soup" / "measured.json").read_text())
        assert told["ingredients"] == models and len(told["held_out"]) == 2 and done.steps == 0
        if kind == "best":
            made, chosen = weights(done.export), load_file(f"{models[told['chosen']]}/{WEIGHTS}")
            assert all(torch.equal(made[k], chosen[k]) for k in chosen)


@pytest.mark.parametrize("method", ["task-arithmetic", "ties"])
def test_given_models_are_summed_as_by_the_command(place, tmp_path, method):
    models = [str(write_export(tiny_clip(seed), tmp_path / f"model-{seed}")) for seed in (1, 2)]
    values = {**soup(place), "ingredients": models, "soup": method, "scale": 0.5, "density": 0.4}
    done = run("merging/soup", tmp_path / "run", values)
    merger = TaskArithmetic(scales=(0.5,)) if method == "task-arithmetic" else Ties(density=0.4, scale=0.5)
    wanted = dict(merge_state(open_inputs(models, base=place / "base"), merger))
    found = open_checkpoint(done.export)
    assert len(wanted) > 20 and all(torch.equal(found.tensor(key), value) for key, value in wanted.items())
    told = json.loads((tmp_path / "run" / "stages" / "00-soup" / "measured.json").read_text())
    assert told["settings"] == merger.settings()


@pytest.mark.slow
def test_soup_interrupted_in_its_second_fine_tune_ends_as_if_it_never_was(place, tmp_path, monkeypatch):
    whole = run("merging/soup", tmp_path / "whole", soup(place))
    with monkeypatch.context() as patch:
        interrupt_at(patch, "ingredient-2", 1)
        with pytest.raises(Interrupted, match="stopped in ingredient-2 after step 2"):
            run("merging/soup", tmp_path / "run", soup(place))
    first = tmp_path / "run" / "stages" / "00-ingredient-1" / "metrics.jsonl"
    stamp = first.stat().st_mtime_ns
    again = run_recipe(resume=tmp_path / "run")
    assert first.stat().st_mtime_ns == stamp  # the finished one was not made again
    one, other = weights(whole.export), weights(again.export)
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_wise_ft_chooses_on_held_out_data_and_reports_the_path(place, tmp_path):
    held = f"folder:{place / 'two'}"
    values = settings(place, alpha=None, alphas=[0.5], judge={"data": held}, same=f"folder:{place / 'one'}")
    done = run("merging/wise-ft", tmp_path / "run", values)
    folder = tmp_path / "run" / "stages" / "01-interpolate"
    told = json.loads((folder / "path.json").read_text())
    assert [p["alpha"] for p in told["path"]] == [0, 0.5, 1] and set(told["best_alpha"]) == {"held out", "same"}
    assert told["chosen_alpha"] == told["best_alpha"]["held out"] and (folder / "path.svg").is_file()
    base, tuned = weights(place / "base"), weights(tmp_path / "run" / "stages" / "00-fine-tune" / "result" / "encoder")
    made, a = weights(done.export), told["chosen_alpha"]
    assert all(torch.allclose(made[k], (1 - a) * base[k] + a * tuned[k], atol=1e-6) for k in made)
    done = run("merging/wise-ft", tmp_path / "half", settings(place, alpha=0.5))
    assert not (tmp_path / "half" / "stages" / "01-interpolate" / "path.json").exists()
    assert all(torch.allclose(weights(done.export)[k], (base[k] + tuned[k]) / 2, atol=1e-6) for k in base)


def test_wise_ft_of_a_model_that_is_tuned_already_only_interpolates(place, tmp_path):
    first = run("merging/wise-ft", tmp_path / "first", settings(place, alpha=0.3))
    tuned = tmp_path / "first" / "stages" / "00-fine-tune" / "result" / "encoder"
    again = run("merging/wise-ft", tmp_path / "again", settings(place, alpha=0.3, tuned=str(tuned)))
    one, other = weights(first.export), weights(again.export)
    assert again.steps == 0 and one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    write_export(tiny_clip(width=16), tmp_path / "narrow")
    with pytest.raises(InputError, match=r"^tuned: "):
        run("merging/wise-ft", tmp_path / "bad", settings(place, alpha=0.3, tuned=str(tmp_path / "narrow")))


def test_branches_of_a_pipeline_are_merged_and_remembered(place, tmp_path):
    train = {"train.steps": 3, "train.batch_size": 4, "train.lr": 1e-3, "train.warmup": 0}
    learn = {"recipe": "merging/wise-ft", "set": {**train, "alpha": 1.0}}
    other = {**learn, "name": "other", "set": {**learn["set"], "model.from": "@start", "train.lr": 2e-3}}
    models = ["@wise-ft", "@other"]
    soup = {"recipe": "merging/soup", "set": {"model.from": "@start", "ingredients": models, "soup": "uniform"}}
    values = {k: v for k, v in settings(place).items() if k != "train"} | {"steps": [learn, other, soup]}
    done = run("pipeline", tmp_path / "run", values)
    parts = [weights(tmp_path / "run" / "steps" / name / "export") for name in ("00-wise-ft", "01-other")]
    made = weights(done.export)
    assert all(torch.allclose(made[k], (parts[0][k] + parts[1][k]) / 2, atol=1e-6) for k in made)
    merged, last = open_export(done.export).data.origin.lineage
    assert [m["lineage"][-1]["merge"] for m in merged["models"]] == ["merging/wise-ft"] * 2
    assert last["recipe"] == "merging/soup"


def tasks(place):
    return [{"name": n, "data": f"folder:{place / n}", "measure": f"folder:{place / n}"} for n in ("one", "two")]


def opcm(place, **more):
    on = [{"use": "merging/continual", "compare": ["average"], "data": f"folder:{place / 'one'}"}]
    values = {**settings(place), "tasks": tasks(place), "compare": ["average"], "orders": 2, **more}
    values.pop("data")
    return {**values, "evaluate": {"retention": "none", "on": on}}


@pytest.mark.slow
def test_opcm_merges_one_at_a_time_and_goes_on_after_a_stop(place, tmp_path, monkeypatch):
    from clipgraft_merging.opcm import merger

    calls, inner = [], merger.merge_into

    def counted(out, *args, **kwargs):
        calls.append(out.name)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return inner(out, *args, **kwargs)

    monkeypatch.setattr(merger, "merge_into", counted)
    with pytest.raises(Interrupted, match="stopped in merge"):
        run("merging/opcm", tmp_path / "run", opcm(place))
    done = run_recipe(resume=tmp_path / "run")
    assert calls == [name for name in ("opcm-0", "opcm-1", "average-0", "average-1") for _ in range(2)]
    folder = tmp_path / "run" / "stages" / "02-merge"
    told, book = (json.loads((folder / f).read_text()) for f in ("measured.json", "accuracy.json"))
    assert summary(book["rows"], method="opcm", orders=book["orders"]).as_dict() == told["methods"]["opcm"]
    assert {len(row) for key, row in book["rows"].items() if key.endswith("/2")} == {2}
    m = {k.partition(".")[2]: v for k, v in done.metrics.items()}
    assert m["average"] == told["methods"]["opcm"]["average"]
    assert m["over/average"] == pytest.approx(m["average"] - m["average/average"])
    assert len(read_state(folder / "opcm-0").models) == 2 and not (folder / "average-0").exists()
    assert (folder / "accuracy.png").stat().st_size > 1000 and (folder / "accuracy.csv").is_file()
    kept, made = weights(folder / "opcm-0"), weights(done.export)
    assert all(torch.equal(kept[k], made[k]) for k in kept)


def test_summary_of_a_matrix():
    rows = {"m/0/1": {"a": 0.9}, "m/0/2": {"a": 0.5, "b": 0.8}, "m/1/1": {"b": 1.0}, "m/1/2": {"b": 0.9, "a": 0.7}}
    found = summary(rows, method="m", orders=[["a", "b"], ["b", "a"]])
    assert found.average == pytest.approx((0.65 + 0.8) / 2)
    assert found.backward == pytest.approx((-0.4 - 0.1) / 2)
    assert found.learnt == pytest.approx((0.85 + 0.85) / 2)


def test_bad_settings_are_refused_before_any_work(place, tmp_path):
    frozen = [{"use": "core/freeze", "towers": ["image"]}]
    for name, values, line in (
        ("soup", {**soup(place), "soup": "greedy", "judge": {}}, "set judge.data"),
        ("soup", {**soup(place), "ingredients": [str(place / "nowhere")]}, "nowhere"),
        ("wise-ft", settings(place, alpha=None), "set judge.data, or give alpha"),
        ("opcm", opcm(place, tasks=tasks(place)[:1] * 2), "two tasks are called one"),
        ("opcm", opcm(place, tasks=[{"name": "a", "measure": "folder:x"}] * 2), "give data to fine-tune on"),
        ("opcm", opcm(place, compat="fusionbench", qkv="fused"), "leave qkv at split"),
    ):
        with pytest.raises(InputError, match=line):
            run(f"merging/{name}", tmp_path / "run", values, dry_run=True)
    with pytest.raises(InputError, match="take it out of core/freeze"):
        run("merging/soup", tmp_path / "run", {**soup(place), "grafts": frozen})
