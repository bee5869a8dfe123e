"""Every recipe of every plugin trains the same weights in two and three processes as in one, at the same global batch.

A recipe is found by the registry: a new one is tested as soon as it is registered, by its preset ``tiny`` or by what
``SETTINGS`` says. Settings are cut to three steps of twelve samples, over the end of an epoch, whose last batch is not
whole. What a stage draws per sample is dealt to the ranks (``clipgraft.testing.equality``), because in a real run each
of them draws its own; ``DRAWS`` says who does. ``APART`` says what can't be dealt, and is switched off to compare.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import load_file

from clipgraft.config.load import load_recipe, presets
from clipgraft.config.schema import TrainConfig
from clipgraft.registry import Registry
from clipgraft.testing.equality import Trace, traced, worst
from clipgraft.testing.ranks import Ranks

GRADIENTS, WEIGHTS, EXPORTS = 1e-4, 5e-3, 1e-3
"""Largest relative error of a gradient, of weights relative to how far they moved, and of an export; fp32."""
BATCH, SAMPLES, STEPS = 12, 30, 3
CHEAP = ("core/finetune", "anomaly/anomalyclip", "llm/clip-refine")
"""In the default session, in two processes."""

FINETUNE = {"model.from": "toyworld/clip", "data.from": "toyworld/images?n=30&captions=detailed"}
SHORT = {"train.steps": STEPS, "train.batch_size": BATCH, "train.optimizer": "sgd", "train.lr": 0.01}

SETTINGS: dict[str, dict[str, Any]] = {
    "core/finetune": FINETUNE,
    "core/pipeline": FINETUNE
    | {"steps": [{"recipe": "core/finetune", "name": name, "set": SHORT} for name in ("first", "second")]},
    "llm/count-to-ten": FINETUNE | {"counting.share": 0.25},
    "llm/reinforce": FINETUNE | {"store": "{folder}/store"},
    "anomaly/winclip": {"shots": 2, "data.from": "toyworld/defects?n=30&size=64&shapes=[tee]"},
    "merging/soup": {"ingredients": [{"order": 0}, {"order": 1, "label_smoothing": 0.1}]},
    "merging/opcm": {"orders": 1},
}
"""What a recipe needs beside its preset ``tiny``, or instead of one; ``{folder}`` is a folder of this module's."""
VARIANTS: dict[str, dict[str, Any]] = {
    "ema": {"train.ema": 0.5},
    "accumulate": {"train.accumulate": 2},
    "teacher": {"teacher": "toyworld/clip-1", "losses": ["core/clip", "core/distill"]},
    "siglip": {"losses": ["core/siglip"], "model.from": "toyworld/clip-1"},
    "adamw": {"train.optimizer": "adamw"},
    "lora-dropout": {"grafts": [{"use": "core/lora", "dropout": 0.1}]},
    "balance": {"data.balance": "class", "data.from": "toyworld/images?n=90"},
    "workers": {"data.workers": 1},
}
"""Further cases of core/finetune: averages, chunks, teachers, scalars, optimizers, dropout, samplers, data workers."""
DRAWS = {
    "anomaly/clipn", "diffusion/diva", "diffusion/genhancer", "diffusion/genhancer-discrete", "diffusion/sds-clip",
    "diffusion/un2clip", "llm/clip-refine", "merging/sam-clip", "video/m2-clip",
}  # fmt: skip
"""Draw per sample: noise and its level, masked places, offsets, prompts. Each process of a real run draws its own."""
APART: dict[str, tuple[dict[str, Any] | None, str]] = {
    "merging/ewa": ({"experts": 1}, "shares a process's own tokens out to the experts at random"),
    "video/ila": (None, "batch normalisation over a process's own videos"),
}
"""By nature not as in one process: what switches it off (None: nothing; ranks must agree, no more), and why."""
LOOSE = {"merging/sam-clip": 5e-3}
"""Gradients of this accuracy: the student starts as its teacher, so that those of the masks are next to nothing."""


def names() -> list[str]:
    return [recipe.name for recipe in Registry.discover().list("recipe")]


CASES = [*names(), *(f"core/finetune-{name}" for name in VARIANTS)]


def walked(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a config with its dotted path, outer ones first."""
    yield path, config
    if isinstance(config, BaseModel):
        for name, field in type(config).model_fields.items():
            yield from walked(getattr(config, name), f"{path}.{field.alias or name}".lstrip("."))
    elif isinstance(config, list | tuple):
        for index, value in enumerate(config):
            yield from walked(value, f"{path}.{index}")


def settings(case: str, folder: Path) -> tuple[str, dict[str, Any], tuple[int, ...]]:
    """Recipe with preset, overrides, and the batch sizes of further streams of data."""
    registry = Registry.discover()
    variant = VARIANTS.get(case.partition("core/finetune-")[2])
    recipe = "core/finetune" if variant else case
    given = {"evaluate.on": [], "evaluate.retention": "none"} | SETTINGS.get(recipe, {}) | (variant or {})
    given |= (APART[recipe][0] or {}) if recipe in APART else {}
    given = {k: v.format(folder=folder) if isinstance(v, str) else v for k, v in given.items()}
    if "tiny" in presets(registry.get("recipe", recipe), registry=registry):
        recipe = f"{recipe}:tiny"
    written = [f"{key}={json.dumps(value)}" for key, value in given.items()]
    _, config = load_recipe(recipe, overrides=written, registry=registry)
    short = {"steps": STEPS, "batch_size": BATCH, "optimizer": "sgd", "lr": 0.01, "clip_norm": 1.0, "warmup": 0}
    short |= {"log_every": 1, "schedule": "constant"}
    cut, rows = dict[str, Any](), list[int]()
    for path, value in walked(config):
        if isinstance(value, TrainConfig):
            cut |= {f"{path}.{key}": x for key, x in short.items() if f"{path}.{key}" not in given}
        elif isinstance(value, str) and re.match(r"toyworld/\w+\?", value) and path not in given:
            cut[path] = re.sub(r"\bn=\d+", f"n={SAMPLES}", value)
        elif path.endswith("masks.batch_size"):
            cut[path] = BATCH // 2
            rows.append(BATCH // 2)
    return recipe, given | cut, tuple(rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, Ranks]]:
    """Processes that run one recipe after another."""
    found = {world: Ranks(world) for world in (2, 3)}
    yield found
    for ranks in found.values():
        ranks.stop()


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, tuple[dict[str, Trace], dict[str, torch.Tensor]]]:
    """What one process left, by case."""
    return {}


def store(folder: Path) -> None:
    """Stored teachers for llm/reinforce."""
    from clipgraft.cli import app

    words = [
        "llm",
        "reinforce-data",
        FINETUNE["data.from"],
        "--teacher",
        "toyworld/clip-1",
        "--out",
        str(folder / "store"),
    ]
    if not (folder / "store").exists():
        from typer.testing import CliRunner

        found = CliRunner().invoke(app, words)
        assert found.exit_code == 0, f"{found.output} {found.exception}"


def exported(out: Path) -> dict[str, torch.Tensor]:
    """Every tensor of an export."""
    found = {}
    for path in sorted((out / "export").glob("*.safetensors")):
        found |= {f"{path.name}/{name}": x for name, x in load_file(path).items() if x.is_floating_point()}
    return found


def compare(
    case: str, world: int, *, shard: bool, folder: Path, pools: dict[int, Ranks], alone: dict[str, Any]
) -> None:
    recipe, overrides, rows = settings(case, folder)
    if case == "llm/reinforce":
        store(folder)
    out = folder / f"{case.replace('/', '-')}-{world}-{shard}"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if case not in alone:
            alone[case] = traced(recipe, overrides, out / "one", rows), exported(out / "one")
    finally:
        torch.set_num_threads(threads)
    one, whole = alone[case]
    overrides = overrides | ({"distributed.shard": True} if shard else {})
    ranks = pools[world].call(traced, recipe, overrides, out / "many", rows, timeout=900)
    for other in ranks[1:]:
        assert {k: t.digest() for k, t in other.items()} == {k: t.digest() for k, t in ranks[0].items()}, "ranks differ"
    found = worst(one, ranks[0])
    print(f"{case} in {world}{' sharded' * shard}: {found}")
    if APART.get(case, ({}, ""))[0] is None:
        return
    assert found.gradients < LOOSE.get(case, GRADIENTS) and found.weights < WEIGHTS, found
    many = exported(out / "many")
    assert many.keys() == whole.keys() != set()
    for name, x in whole.items():
        error, size = float((many[name] - x).norm()), float(x.norm())
        assert error <= EXPORTS * max(size, 1e-3), f"{name} of the export: {error} of {size}"
    assert (sum(t.draws for t in one.values()) > 0) == (case in DRAWS), "bring DRAWS up to date"
    shutil.rmtree(out)


@pytest.mark.parametrize("case", CHEAP)
def test_two_processes_train_what_one_trains(case: str, folder: Path, pools: Any, alone: Any) -> None:
    compare(case, 2, shard=False, folder=folder, pools=pools, alone=alone)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_two_and_three_processes_train_what_one_trains(case: str, folder: Path, pools: Any, alone: Any) -> None:
    compare(case, 2, shard=False, folder=folder, pools=pools, alone=alone)
    compare(case, 3, shard=False, folder=folder, pools=pools, alone=alone)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_two_processes_with_half_the_weights_each_train_what_one_trains(
    case: str, folder: Path, pools: Any, alone: Any
) -> None:
    compare(case, 2, shard=True, folder=folder, pools=pools, alone=alone)


def test_the_tables_name_recipes_that_exist() -> None:
    assert {*SETTINGS, *DRAWS, *APART, *LOOSE, *CHEAP} <= {*names()}
