"""Plugins on each other's results: every export is the next one's model, and parts of several make one run."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipgraft.checkpoint import read_manifest
from clipgraft.registry import Registry
from clipgraft.testing.subject import Subject
from clipgraft.testing.trial import HALF, Trial
from clipgraft.testing.watch import Watch

pytestmark = pytest.mark.slow
CHAIN = ("llm/negclip", "merging/ewa", "diffusion/genhancer", "anomaly/clipn")


@pytest.fixture(scope="module")
def registry() -> Registry:
    found = Registry.discover()
    missing = {name.partition("/")[0] for name in CHAIN} - {p.name for p in found.plugins if p.status == "ok"}
    if missing:
        pytest.skip(f"needs the plugins {', '.join(sorted(missing))}")
    return found


def test_every_export_is_the_next_ones_model(registry: Registry, tmp_path: Path) -> None:
    """Four recipes of four plugins in a row: the last export tells all four, a plain CLIP and a head."""
    model: dict[str, object] = {}
    for recipe in CHAIN:
        trial = Trial(Subject(recipe.partition("/")[0]), recipe, tmp_path / recipe.replace("/", "-"), registry)
        run = trial.run("run", trial.config(steps=HALF, **model))
        model = {"model": {"from": str(run / "export")}}
    manifest = read_manifest(run / "export")
    assert manifest["level"] == "L1"
    assert [step.get("recipe") for step in manifest["lineage"]] == [*CHAIN]


def test_parts_of_several_plugins_make_one_run(registry: Registry, tmp_path: Path) -> None:
    """Losses of a plugin beside the core's loss and its adapters, in the core's recipe, and a plain CLIP again."""
    trial = Trial(Subject("core"), "core/finetune", tmp_path, registry)
    settings = {"losses": ["core/clip", {"use": "llm/hycd", "alpha": 0.5, "temperature": 1.0}], "teacher": "base"}
    config = trial.config(steps=HALF, grafts=[{"use": "core/lora", "rank": 4}], **settings)
    run = trial.run("run", config, watch := Watch())
    manifest = read_manifest(run / "export")
    assert watch.steps == HALF and manifest["level"] == "L0"
    assert manifest["grafts"] == [], "the run's model is the stage's, whose adapters are in its weights"
    trained = read_manifest(run / "stages" / "00-train" / "result" / "encoder")
    assert [(graft["use"], graft["merged"]) for graft in trained["grafts"]] == [("core/lora", True)]
