"""The retention suite: what it measures on which model, that it can be measured, and that a run uses it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from clipgraft.checkpoint import open_export, write_export
from clipgraft.data import open_source
from clipgraft.encoders import load
from clipgraft.evaluation import evaluate
from clipgraft.evaluation.suites import open_suite
from clipgraft.execution import run_recipe
from clipgraft.registry import Registry
from clipgraft.testing.tiny import tiny_clip
from clipgraft_toyworld import suites
from clipgraft_toyworld.suites import retention, speaks_toy

REGISTRY = Registry.discover(allow=("toyworld",))


def test_models_of_the_world_are_known_by_their_words_even_after_an_export(tmp_path: Path) -> None:
    encoder = load("toyworld/clip-1", registry=REGISTRY)
    write_export(encoder, tmp_path / "copy")
    for model in (encoder, open_export(tmp_path / "copy")):
        expected = [f"{what}@{suites.WORLD}" for what in ("zero-shot", "retrieval", suites.KNN, suites.CLUSTERING)]
        assert speaks_toy(model) and retention(model) == expected
    encoder.data.tokenizer = replace(encoder.tokenizer, context_length=104)
    assert speaks_toy(encoder), "a longer context"
    assert not speaks_toy(tiny_clip(context=32, vocab=187)), "as many words, but others"


def test_other_models_get_real_images_where_they_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    both, blind = tiny_clip(), tiny_clip()
    blind.text, blind.data.tokenizer = None, None
    words, photos = f"zero-shot@{suites.DIGITS}", f"retrieval@{suites.PHOTOS}"
    structure = [f"{suites.KNN}@{suites.DIGITS}", f"{suites.CLUSTERING}@{suites.DIGITS}"]
    expected = {
        frozenset({"sklearn", "skimage"}): ([words, photos, *structure], 1),
        frozenset({"sklearn"}): ([words, *structure], 1),
        frozenset({"skimage"}): ([], 0),
        frozenset(): ([], 0),
    }
    for installed, (named, probes) in expected.items():
        monkeypatch.setattr(suites, "find_spec", lambda name, here=installed: name if name in here else None)
        assert retention(both) == named
        assert retention(blind) == [f"linear-probe@{suites.DIGITS}", *structure] * probes
    toy = load("toyworld/clip-1", registry=REGISTRY)
    assert [entry.partition("?")[0] for entry in retention(toy)][2:] == ["evaluation/knn"]


def test_it_is_measured_on_a_few_hundred_images() -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    assert 300 < len(open_source(suites.DIGITS, registry=REGISTRY)) < 400
    assert len(open_source(suites.PHOTOS, registry=REGISTRY)) < 30
    blind = tiny_clip()
    blind.text, blind.data.tokenizer = None, None
    for encoder, names in ((tiny_clip(), {"core/zero-shot", "core/retrieval"}), (blind, {"core/linear-probe"})):
        found = evaluate(encoder, open_suite("retention", encoder, registry=REGISTRY), registry=REGISTRY)
        assert found.keys() == names and all(0 <= v <= 1 for e in found.values() for v in e.metrics.values())


def test_with_the_evaluation_plugin_neighbours_and_clusters_are_measured_too() -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("clipgraft_evaluation")
    registry = Registry.discover(allow=("toyworld", "evaluation"))
    models = [load("toyworld/clip-1", registry=registry), tiny_clip()]
    for model in models:
        found = evaluate(model.eval(), open_suite("retention", model, registry=registry), registry=registry)
        assert {"evaluation/knn", "evaluation/clustering"} < found.keys()
        assert found["evaluation/clustering"].metrics.keys() == {"nmi", "accuracy", "ari"}
        assert found["evaluation/knn"].metrics.keys() == {"top1_weighted_k5", "mean_per_class_weighted_k5"}
        if model is models[0]:  # knows its classes
            assert (
                found["evaluation/knn"].metrics["top1_weighted_k5"]
                > 0.5
                < found["evaluation/clustering"].metrics["nmi"]
            )


def test_training_that_ruins_a_model_is_told_so_and_costs_seconds(tmp_path: Path) -> None:
    settings = {
        "model.from": "toyworld/clip", "data.from": "toyworld/images?n=64", "losses": ["core/clip"], "train.steps": 3,
        "train.batch_size": 32, "train.lr": 0.05, "train.warmup": 0,
    }  # fmt: skip
    began = time.process_time()
    found = run_recipe("finetune", overrides=settings, out=tmp_path / "run", registry=REGISTRY).forgetting
    assert time.process_time() - began < 30
    assert found["core/zero-shot.top1"]["verdict"] == "worse" and found["core/zero-shot.top1"]["p"] < 1e-9
    assert found["core/zero-shot.top1"]["before"] > 0.75
    log = (tmp_path / "run/log.txt").read_text()
    assert "forgetting: " in log and "core/zero-shot.top1" in log


def test_the_registered_suite_is_the_function_itself() -> None:
    registered = REGISTRY.get("suite", "retention")
    assert registered.name == "toyworld/retention" and registered.component.config is None
    assert REGISTRY.build("suite", "retention", {}) is retention
