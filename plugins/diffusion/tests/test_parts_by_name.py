"""The parts as somebody else's plugin uses them: by name, through the registry. The plugin is the README's."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from clipgraft.checkpoint import open_export, write_export
from clipgraft.errors import InputError
from clipgraft.execution import run_recipe
from clipgraft.registry import Registry
from clipgraft.testing.tiny import tiny_clip

README = Path(__file__).resolve().parents[1] / "README.md"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny CLIP, twelve pictures, and the README's plugin."""
    folder = tmp_path_factory.mktemp("parts")
    write_export(tiny_clip(), folder / "clip")
    found = re.search(r'^```python title="details.py"\n(.*?)^```', README.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert found is not None
    (folder / "details.py").write_text(found[1], "utf-8")
    g = torch.Generator().manual_seed(0)
    for i in range(12):
        pixels = torch.randint(0, 256, (40, 40, 3), dtype=torch.uint8, generator=g)
        (folder / "pictures" / "one").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(folder / "pictures" / "one" / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def registry(world):
    return Registry.discover(allow=["diffusion"], files=[world / "details.py"])


def settings(world, **more):
    train = {"steps": 2, "batch_size": 4, "lr": 1e-3, "warmup": 0, "log_every": 1}
    data = {"model.from": str(world / "clip"), "data.from": f"folder:{world / 'pictures'}", "train": train}
    return data | {"evaluate.retention": "none"} | more


def test_the_plugin_imports_nothing_of_this_package(world):
    tree = ast.parse((world / "details.py").read_text("utf-8"))
    modules = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    modules |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert {module.partition(".")[0] for module in modules} == {"torch", "clipgraft"}


@pytest.mark.parametrize(
    "objective",
    [
        "diffusion/eps",
        {"use": "diffusion/v", "low": 900, "draws": 2},
        {"use": "diffusion/flow", "law": "uniform", "low": 0.5, "prediction": "sample"},
    ],
    ids=["eps", "v", "flow"],
)
def test_a_plugin_of_somebody_else_trains_a_tower_with_the_parts(world, registry, tmp_path, objective):
    done = run_recipe(
        "details", overrides=settings(world, objective=objective), out=tmp_path / "run", registry=registry
    )
    assert done.status == "done"
    assert done.steps == 2
    lines = (done.run / "stages/00-details/metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["terms"]["objective"] > 0 for line in lines)
    before, after = tiny_clip().state_dict(), open_export(done.export).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("image.") for name in changed)


def test_settings_of_a_part_are_checked_before_any_work(world, registry, tmp_path):
    bad = {"use": "diffusion/eps", "low": 9, "high": 3}
    with pytest.raises(InputError, match=r"objective: low 9 must be below high 3"):
        run_recipe("details", overrides=settings(world, objective=bad), out=tmp_path / "run", registry=registry)
    with pytest.raises(InputError, match=r"unknown loss 'diffusion/epsilon'"):
        run_recipe(
            "details", overrides=settings(world, objective="diffusion/epsilon"), out=tmp_path / "run", registry=registry
        )


def test_without_this_package_one_line_says_which_is_missing(world, tmp_path):
    alone = Registry.discover(allow=[], files=[world / "details.py"])
    with pytest.raises(InputError, match=r"unknown loss .diffusion/eps.*Plugin diffusion is disabled"):
        run_recipe(
            "details", overrides=settings(world, objective="diffusion/eps"), out=tmp_path / "run", registry=alone
        )


@pytest.mark.parametrize("name", ["eps", "v", "flow", "masked-token"])
def test_finetune_refuses_a_loss_that_scores_a_generator(world, registry, tmp_path, name):
    with pytest.raises(InputError, match=rf"diffusion/{name} doesn't .*: diffusion/diva, diffusion/genhancer"):
        run_recipe(
            "finetune",
            overrides=settings(world, losses=[f"diffusion/{name}"]),
            out=tmp_path / "run",
            dry_run=True,
            registry=registry,
        )
