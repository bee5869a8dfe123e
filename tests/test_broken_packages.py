"""The real command line beside packages whose manifest raises, is of another API major, or is there twice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

PACKAGES = sorted(p.parent for p in (Path(__file__).parent / "packages").glob("*/pyproject.toml"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder for PYTHONPATH that holds the packages as installed; empty when pip did install them."""
    folder = tmp_path_factory.mktemp("site")
    for package in PACKAGES:
        project = tomllib.loads((package / "pyproject.toml").read_text("utf-8"))["project"]
        try:
            metadata.version(project["name"])
        except metadata.PackageNotFoundError:
            info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
            info.mkdir()
            header = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
            (info / "METADATA").write_text(header, "utf-8")
            groups = project["entry-points"].items()
            lines = [f"[{group}]\n{name} = {module}\n" for group, points in groups for name, module in points.items()]
            (info / "entry_points.txt").write_text("".join(lines), "utf-8")
            for source in package.glob("*.py"):
                shutil.copy(source, folder)
    return str(folder)


def clipgraft(site: str, *args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    hidden = ("CLIPGRAFT_PLUGINS", "CLIPGRAFT_DISABLE", "CLIPGRAFT_STRICT")
    env = {k: v for k, v in os.environ.items() if k not in hidden} | {"PYTHONPATH": site} | variables
    command = [sys.executable, "-c", "from clipgraft.cli import main; main()", *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_help_still_works_and_each_failure_is_one_line(site: str) -> None:
    found = clipgraft(site, "--help")
    assert found.returncode == 0 and "Usage" in found.stdout
    lines = [line for line in found.stderr.splitlines() if "sample-" in line]
    assert len(lines) == 4 and "Traceback" not in found.stderr
    assert any("plugin sample-raises is broken: RuntimeError: this manifest always fails" in line for line in lines)


def test_every_failure_has_its_status(site: str) -> None:
    found = clipgraft(site, "plugins", "list", "--json")
    rows = [row for row in json.loads(found.stdout) if row["name"].startswith("sample-")]
    assert sorted((row["distribution"], row["status"]) for row in rows) == [
        ("clipgraft-sample-future", "incompatible"),
        ("clipgraft-sample-raises", "broken"),
        ("clipgraft-sample-twin-a", "duplicate"),
        ("clipgraft-sample-twin-b", "duplicate"),
    ]
    assert all(row["error"] and row["components"] == [] for row in rows)


def test_doctor_prints_the_traceback_and_fails(site: str) -> None:
    found = clipgraft(site, "plugins", "doctor", "sample-raises")
    assert found.returncode == 1 and "Traceback" in found.stdout and "this manifest always fails" in found.stdout


def test_selection_silences_them_and_strictness_does_not(site: str) -> None:
    off = clipgraft(site, "--help", CLIPGRAFT_DISABLE="sample-raises,sample-future,sample-twin")
    assert off.returncode == 0 and "sample-" not in off.stderr
    assert "sample-" not in clipgraft(site, "--help", CLIPGRAFT_PLUGINS="").stderr
    strict = clipgraft(site, "plugins", "list", CLIPGRAFT_STRICT="1", CLIPGRAFT_PLUGINS="sample-raises")
    assert strict.returncode == 1 and strict.stderr.startswith("error: plugin sample-raises is broken")
