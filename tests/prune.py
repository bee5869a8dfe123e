"""Uninstall from this environment whatever the given wheels, the test tools and pip do not require."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

TOOLS = ["hypothesis", "packaging", "pip", "pytest", "pytest-timeout"]


def needed(names: list[str]) -> set[str]:
    """The closure of ``names`` over declared, applicable requirements."""
    done: set[tuple[str, str]] = set()
    todo = [(name, "") for name in names]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in done:
            continue
        done.add((name, extra))
        try:
            requirements = map(Requirement, distribution(name).requires or [])
        except PackageNotFoundError:
            continue
        for requirement in requirements:
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                todo += [(canonicalize_name(requirement.name), e) for e in ["", *requirement.extras]]
    return {name for name, _ in done}


def main() -> None:
    """``prune.py WHEEL...``"""
    wheels = [str(parse_wheel_filename(Path(path).name)[0]) for path in sys.argv[1:]]
    installed = {canonicalize_name(found.metadata["Name"]) for found in distributions()}
    if surplus := sorted(installed - needed([*TOOLS, *wheels])):
        print("uninstalling", *surplus)
        subprocess.run([sys.executable, "-m", "pip", "uninstall", "-q", "-y", *surplus], check=True)


if __name__ == "__main__":
    main()
