"""Every evaluator of every plugin measures in several processes what it measures in one: no sample twice, none lost.

Numbers of samples that neither two nor three divide, in batches that aren't whole; so ranks have unequal shares.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from clipgraft.config.schema import EvaluatorNode
from clipgraft.encoders import load
from clipgraft.evaluation import evaluate
from clipgraft.registry import Registry
from clipgraft.testing.ranks import Ranks

IMAGES, CROWDS = "toyworld/images?split=test&n=29", "toyworld/crowds?split=test&n=11&size=64"
VIDEOS, PAIRS = "toyworld/videos?split=test&n=11", "toyworld/pairs?split=test&per_pattern=3"
SAM = "toyworld/sam-teacher"

NODES: dict[str, dict[str, Any]] = {
    "anomaly/inspection": {
        "data": "toyworld/defects?split=test&n=29&size=64&shapes=[tee]",
        "method": "anomaly/prompts",
    },
    "core/linear-probe": {"data": IMAGES, "train": "toyworld/images?n=31", "solver": "ridge"},
    "core/pairs": {"data": PAIRS},
    "core/retrieval": {"data": IMAGES + "&per_image=2"},
    "core/zero-shot": {"data": IMAGES, "per_class": True},
    "evaluation/calibration": {"data": IMAGES},
    "evaluation/clustering": {"data": IMAGES + "&label=shape"},
    "evaluation/corruption": {"data": IMAGES, "corruptions": ["gaussian-noise"], "severities": [3]},
    "evaluation/geometry": {"data": IMAGES},
    "evaluation/hard-negatives": {"data": CROWDS.replace("&size=64", "")},
    "evaluation/knn": {"data": IMAGES, "train": "toyworld/images?n=31", "k": [1, 5]},
    "evaluation/out-of-distribution": {"data": IMAGES, "outliers": "toyworld/crowds?split=test&n=13"},
    "evaluation/pairs-grid": {"data": PAIRS},
    "llm/caption-retrieval": {"data": IMAGES + "&captions=detailed&per_image=2"},
    "llm/long-retrieval": {"data": IMAGES + "&captions=story"},
    "merging/masked-zero-shot-seg": {"data": CROWDS, "sam": SAM, "masks": {"grid": 2}},
    "merging/prompted-masks": {"data": CROWDS, "sam": SAM},
    "merging/kept-masks": {"data": CROWDS, "teacher": SAM},
    "merging/word-segments": {"data": CROWDS, "size": 64},
    "merging/zero-shot-seg": {"data": CROWDS, "size": 64},
    "video/classification": {"data": VIDEOS, "templates": ["{}"], "batch_size": 4},
    "video/order": {"data": VIDEOS, "batch_size": 4},
    "video/text-retrieval": {"data": VIDEOS, "batch_size": 4},
}
ELSEWHERE = {
    "anomaly/clipn-ood": "needs a branch that a run made",
    "evaluation/winoground": "needs the published files; its features are those of core/pairs",
    "merging/continual": "reads the book of a run of merging/opcm",
    "merging/ingredients": "reads the models of a run of merging/soup",
    "video/classifier": "needs a classifier that a run made",
    "video/cost": "measures seconds",
}
"""Evaluators that are not compared here, and why."""
CASES = [recipe.name for recipe in Registry.discover().list("evaluator") if recipe.name not in ELSEWHERE]


def measured(name: str) -> dict[str, Any]:
    """All that an evaluator says about the toy world's first CLIP."""
    registry = Registry.discover()
    node = dict(NODES[name])
    if name == "video/order":
        from clipgraft.data import open_source

        first, second, *_ = open_source(VIDEOS, registry=registry).classes
        node["opposites"] = [[first, second]]
    encoder = load("toyworld/clip", registry=registry).eval()
    found = evaluate(encoder, [EvaluatorNode(use=name, **node)], registry=registry, batch_size=8)
    (evaluation,) = found.values()
    return {"summary": evaluation.summary(), "samples": [dict(row) for row in evaluation.samples]}


def close(a: Any, b: Any, path: str = "") -> None:
    """Equal, numbers up to rounding."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            close(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            close(x, y, f"{path}/{index}")
    elif isinstance(a, float):
        assert math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-5) or (math.isnan(a) and math.isnan(b)), f"{path}: {a}, {b}"
    else:
        assert a == b, f"{path}: {a}, {b}"


@pytest.fixture(scope="module")
def pools() -> Any:
    found = {world: Ranks(world) for world in (2, 3)}
    yield found
    for ranks in found.values():
        ranks.stop()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_ranks_measure_what_one_process_measures(name: str, pools: dict[int, Ranks], tmp_path: Path) -> None:
    assert name in NODES, f"give {name} data in NODES, or say in ELSEWHERE why not"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = measured(name)
    finally:
        torch.set_num_threads(threads)
    for ranks in pools.values():
        for found in ranks.call(measured, name, timeout=600):
            close(alone, found)


def test_the_tables_name_evaluators_that_exist() -> None:
    assert {*NODES, *ELSEWHERE} == {e.name for e in Registry.discover().list("evaluator")}
