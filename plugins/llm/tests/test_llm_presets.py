"""Presets read as settings, and claims name what exists: nothing is opened."""

from importlib import import_module
from importlib.resources import files

import pytest

from clipgraft.config.load import load_recipe
from clipgraft.registry import Registry

RECIPES = ("negclip", "count-to-ten", "clip-refine", "tinyclip", "reinforce")
PRESETS = sorted(
    p.name.removesuffix(".yaml") for p in (files("clipgraft_llm") / "recipes").iterdir() if p.name.startswith(RECIPES)
)


@pytest.fixture(scope="module")
def registry():
    return Registry.discover()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_reads(name, registry):
    recipe = max((r for r in RECIPES if name.startswith(r)), key=len)
    preset = name.removeprefix(recipe).removeprefix("-")
    tiny = preset == "tiny"
    if tiny and not {"toyworld", "evaluation"} <= {
        r.plugin for k in ("dataset", "evaluator") for r in registry.list(k)
    }:
        pytest.skip("the toy world or the evaluation plugin is not in use")
    given = [] if tiny else ["data.from=csv:table.csv"]
    given += [] if "model" in preset or "vit" in preset or tiny else ["model.from=open_clip:ViT-B-32"]
    given += ["store=store"] if recipe == "reinforce" else []
    registered, config = load_recipe(f"{recipe}:{preset}" if preset else recipe, overrides=given, registry=registry)
    assert registered.name == f"llm/{recipe}" and config.train.steps > 0 and config.losses
    for loss in config.losses:
        registry.build("loss", loss.use, loss.settings)


@pytest.mark.parametrize(("module", "name"), [("negatives", "NEGCLIP"), ("tiny", "TINYCLIP")])
def test_arms_of_a_claim_read(module, name, registry):
    if not {"toyworld", "evaluation"} <= {r.plugin for k in ("dataset", "evaluator") for r in registry.list(k)}:
        pytest.skip("the toy world or the evaluation plugin is not in use")
    claim = getattr(import_module(f"clipgraft_llm.{module}.claims"), name)
    measured = set()
    for arm in claim.arms:
        _, config = load_recipe(arm.recipe, overrides=list(arm.overrides), registry=registry)
        measured |= {node.use for node in config.evaluate.on}
        assert all("split=test" in node.data for node in config.evaluate.on)
    assert {metric.partition(".")[0] for metric in claim.metrics} <= measured
