"""The command group and the manifest of the plugin."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from clipgraft.errors import InputError
from clipgraft_toyworld import plugin
from clipgraft_toyworld.commands import app
from clipgraft_toyworld.models import manifest

run = CliRunner()


def test_every_target_and_config_of_the_manifest_exists() -> None:
    components = [
        *plugin.clipgraft_datasets(),
        *plugin.clipgraft_encoders(),
        *plugin.clipgraft_heads(),
    ]
    assert len({component.name for component in components}) == len(components)
    for component in components:
        for address in filter(None, (component.target, component.config)):
            module, _, attribute = address.partition(":")
            assert hasattr(importlib.import_module(module), attribute), address


def test_configs_carry_the_fields_of_their_targets() -> None:
    import inspect

    for component in plugin.clipgraft_datasets():
        target, config = (
            getattr(importlib.import_module(address.partition(":")[0]), address.partition(":")[2])
            for address in (component.target, component.config or "")
        )
        assert set(config.model_fields) == set(inspect.signature(target).parameters), component.name
        for name, value in config().model_dump().items():
            assert inspect.signature(target).parameters[name].default == value, (component.name, name)


def test_the_manifest_imports_nothing_heavy() -> None:
    code = "import sys, clipgraft_toyworld.plugin; print({'torch', 'numpy', 'pydantic', 'typer'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


@pytest.mark.parametrize("kind", ["images", "pairs", "defects", "videos", "crowds"])
def test_a_contact_sheet_is_written(tmp_path: Path, kind: str) -> None:
    from PIL import Image

    out = tmp_path / "sheet.png"
    result = run.invoke(app, ["sheet", "--out", str(out), "--kind", kind, "--json"])
    assert result.exit_code == 0 and json.loads(result.stdout) == {"sheet": str(out)}
    with Image.open(out) as image:
        assert image.mode == "RGB" and min(image.size) > 600 and len(image.getcolors(1 << 24) or []) > 1000


def test_the_manifest_is_printed() -> None:
    everything = run.invoke(app, ["manifest", "--json"])
    assert json.loads(everything.stdout) == manifest()
    one = run.invoke(app, ["manifest", "clip-0"])
    assert one.exit_code == 0 and "zero_shot" in one.stdout and "seed 0" in one.stdout


def test_names_that_are_not_there_are_answered_with_those_that_are() -> None:
    for arguments in (["manifest", "clip0"], ["sensitivity", "generatr"]):
        result = run.invoke(app, arguments)
        assert isinstance(result.exception, InputError) and "did you mean" in str(result.exception)
    wrong = run.invoke(app, ["sheet", "--out", "x.png", "--size", "48"])
    assert isinstance(wrong.exception, InputError)


def test_sensitivity_is_printed() -> None:
    pytest.importorskip("diffusers")
    result = run.invoke(app, ["sensitivity", "generator", "--n", "64", "--json"])
    assert result.exit_code == 0
    assert set(json.loads(result.stdout)) >= {"loss", "all", "orientation", "glyph", "shape"}
