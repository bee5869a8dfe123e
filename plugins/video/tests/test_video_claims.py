"""Claims name what exists: every arm is a config that reads, is measured on the test split, and gives its metrics."""

from __future__ import annotations

import pytest

from clipgraft.claims import Claim
from clipgraft.config.load import load_recipe
from clipgraft.data import open_source
from clipgraft.registry import Registry
from clipgraft_video import claims

pytest.importorskip("clipgraft_toyworld")
CLAIMS = [value for value in vars(claims).values() if isinstance(value, Claim)]


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry.discover()


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_arms_of_a_claim_read(claim: Claim, registry: Registry) -> None:
    for arm in claim.arms:
        _, config = load_recipe(arm.recipe, overrides=list(arm.overrides), registry=registry)
        assert all("split=test" in node.data for node in config.evaluate.on)
        assert "split=train" in config.data.from_
        read = {g.metric for g in claim.gains if g.over in (arm.name, "before")} | {k.metric for k in claim.kept}
        needed = set(claim.metrics) if arm is claim.method else read
        assert {metric.rpartition(".")[0] for metric in needed} <= {node.use for node in config.evaluate.on}
    assert claim.tried and claim.name in {record.name.partition("/")[2] for record in registry.list("claim")}


def test_frosters_tests_hold_no_combination_that_is_trained_on(registry: Registry) -> None:
    _, config = load_recipe(claims.FROSTER.method.recipe, overrides=[], registry=registry)
    trained = open_source(config.data.from_.replace("n=320", "n=40"), registry=registry)
    asked = open_source(config.evaluate.on[0].data.replace("n=800", "n=40"), registry=registry)
    assert len(trained.classes) == len(asked.classes) == 20 and not set(trained.classes) & set(asked.classes)
