"""What starting the command line costs, in CPU seconds, against importing torch and open_clip in the same run.

python benchmarks/cli_start.py [--plugins 20] [--repeat 5] [--json | --markdown]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from table import table

STUB = """from clipgraft.spec import CommandSpec, Component, hookimpl

@hookimpl
def clipgraft_losses():
    return [Component(name=f"loss-{k}", target="absent:Loss", summary="A stub") for k in range(5)]

@hookimpl
def clipgraft_commands():
    return [CommandSpec(name="NAME", target="absent:app", help="A stub")]
"""
CLI = "from clipgraft.cli import main; main({})"
CASES = {
    "python": "pass",
    "import typer": "import typer",
    "import clipgraft": "import clipgraft",
    "clipgraft --help": CLI.format(["--help"]),
    "clipgraft plugins list --json": CLI.format(["plugins", "list", "--json"]),
    "clipgraft list recipes": CLI.format(["list", "recipes"]),
    "import torch": "import torch",
    "import open_clip": "import open_clip",
}


def cpu_seconds(code: str, path: str) -> float:
    """User and system time of one fresh interpreter."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], env=env, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def write_stubs(folder: Path, count: int) -> None:
    """``count`` installed plugins that are nothing but files on the path."""
    for k in range(count):
        name = f"stub{k:02d}"
        (folder / f"clipgraft_{name}.py").write_text(STUB.replace("NAME", name), "utf-8")
        info = folder / f"clipgraft_{name}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: clipgraft-{name}\nVersion: 1\n", "utf-8")
        (info / "entry_points.txt").write_text(f"[clipgraft.v1]\n{name} = clipgraft_{name}\n", "utf-8")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plugins", type=int, default=20, help="stub plugins beside the installed ones")
    parser.add_argument("--repeat", type=int, default=5, help="the smallest of this many is reported")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_stubs(Path(folder), options.plugins)
        seconds = {k: min(cpu_seconds(code, folder) for _ in range(options.repeat)) for k, code in CASES.items()}
    rows = {
        k: {"cpu_seconds": round(s, 3), "x_torch": round(s / seconds["import torch"], 3)} for k, s in seconds.items()
    }
    if options.json:
        print(json.dumps({"plugins": options.plugins, "repeat": options.repeat, "cases": rows}))
        return
    lines = [(name, row["cpu_seconds"], row["x_torch"]) for name, row in rows.items()]
    print(table(("what", "CPU s", "of import torch"), lines, markdown=options.markdown))


if __name__ == "__main__":
    main()
