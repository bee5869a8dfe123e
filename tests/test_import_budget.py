"""What starting costs: no heavy library is imported by ``--help`` or ``import clipgraft``, and it takes little CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

HEAVY = ("torch", "numpy", "pydantic", "yaml", "accelerate", "PIL", "transformers", "open_clip", "diffusers")
START = """
import json, resource, sys
try:
    {code}
except SystemExit:
    pass
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({{"modules": sorted(m for m in {heavy} if m in sys.modules), "cpu": used.ru_utime + used.ru_stime}}))
"""
COMMAND = "import clipgraft.cli; clipgraft.cli.main({args})"


def start(code: str) -> dict[str, object]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("CLIPGRAFT_")}
    command = [sys.executable, "-c", START.format(code=code, heavy=HEAVY)]
    found = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=True)
    return dict(json.loads(found.stdout.splitlines()[-1]))


def test_the_package_and_its_help_import_nothing_heavy() -> None:
    assert start("import clipgraft; clipgraft.InputError; clipgraft.Component; clipgraft.plugins()")["modules"] == []
    assert start(COMMAND.format(args=["--help"]))["modules"] == []


@pytest.mark.parametrize(
    "args", [["list", "recipes"], ["plugins", "list", "--json"], ["run", "--help"], ["eval", "--help"]]
)
def test_light_commands_import_nothing_heavy(args: list[str]) -> None:
    found = start(COMMAND.format(args=args))["modules"]
    assert found in ([], ["pydantic"])  # Typer 0.29 reads command-line values with pydantic


def test_help_takes_little_cpu() -> None:
    assert min(float(str(start(COMMAND.format(args=["--help"]))["cpu"])) for _ in range(3)) <= 0.35


def test_what_every_pytest_loads_is_light() -> None:
    """The entry point ``pytest11`` is imported in projects that have nothing to do with clipgraft."""
    code = "import clipgraft.testing.pytest_plugin"
    assert start(code)["modules"] == [] and min(float(str(start(code)["cpu"])) for _ in range(3)) <= 0.1
    names = "print(*(name for name in sys.modules if name.startswith('clipgraft')))"
    done = subprocess.run([sys.executable, "-c", f"import sys, {code[7:]}; {names}"], capture_output=True, text=True)
    assert set(done.stdout.split()) <= {"clipgraft", "clipgraft.testing", "clipgraft.testing.pytest_plugin"}


def test_new_imports_nothing_heavy() -> None:
    assert start(COMMAND.format(args=["new", "plugin", "--help"]))["modules"] in ([], ["pydantic"])
