"""The same seed gives the same weights in other processes, whatever Python's hash seed: a recipe of three families."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clipgraft import files
from clipgraft.config.describe import describe
from clipgraft.config.load import presets
from clipgraft.registry import current

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["clipn", "negclip", "ez-clip"])
def test_two_processes_with_other_hash_seeds_make_the_same_weights(tmp_path: Path, name: str) -> None:
    registry = current()
    if name not in {found.component.name for found in registry.list("recipe")}:
        pytest.skip(f"the plugin of {name} is not here")
    recipe = registry.get("recipe", name)
    assert "tiny" in presets(recipe, registry=registry)
    rows = describe(registry.config_class("recipe", recipe.name))  # type: ignore[arg-type]
    short = [f"--set={row.key}=2" for row in rows if row.key.endswith("train.steps")]
    found = []
    for seed in ("1", "2"):
        command = [sys.executable, "-m", "clipgraft", "run", f"{name}:tiny", "--out", str(tmp_path / seed), "--json"]
        command += [*short, "--set=evaluate.retention=none", "--set=threads=1", "--seed=3"]
        env = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        export = Path(json.loads(done.stdout)["export"])
        found.append({path.name: files.sha256_of(path) for path in export.glob("*.safetensors")})
    assert found[0] == found[1] and found[0]
