from __future__ import annotations

import json
import subprocess
import sys

from clipgraft.registry import Registry

HELP = """
import json, sys
from clipgraft.cli import main
for name in ("embed", "search", "classify"):
    try:
        main([name, "--help"])
    except SystemExit as stopped:
        assert stopped.code == 0
heavy = ("torch", "numpy", "PIL", "open_clip", "pyarrow", "faiss", "transformers")
print(json.dumps([name for name in heavy if name in sys.modules]))
"""


def test_three_commands_and_no_group() -> None:
    registry = Registry.discover(allow=["embedding"])
    own = [spec.name for spec in registry.commands() if spec.target.startswith("clipgraft_embedding.")]
    assert own == ["embed", "search", "classify"]
    assert all(callable(registry.resolve(spec.target)) for spec in registry.commands() if spec.name in own)


def test_help_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []
    for option in ("--shard-size", "--restart", "--query", "--labels-file"):
        assert option in done.stdout
