"""The configuration files of the pages: ``--dry-run`` reads each, and says what it would need or what is in the way."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from clipgraft.cli import app

FILES = Path(__file__).parents[1] / "docs" / "configs"
SAID = {
    "ddp": (0, "would need 2 processes, weights whole in each of them"),
    "fsdp2": (0, "would need 2 processes, weights split over them (FSDP2)"),
    "deepspeed-zero2": (2, "deepspeed-zero2.yaml (ZeRO stage 2, 2 processes): DeepSpeed is not "),
    "deepspeed-zero3": (2, "deepspeed-zero3.yaml (ZeRO stage 3, 2 processes): DeepSpeed is not "),
}


def test_every_file_is_looked_at() -> None:
    assert {path.stem for path in FILES.glob("*.yaml")} == SAID.keys()


@pytest.mark.parametrize("name", SAID)
def test_a_dry_run_reads_the_file(name: str, tmp_path: Path) -> None:
    sets = [f"distributed.file={FILES / name}.yaml", "model.from=toyworld/clip", "data.from=toyworld/images?n=8"]
    words = ["run", "finetune", "--dry-run", "--out", str(tmp_path / "run"), *(w for s in sets for w in ("--set", s))]
    found = CliRunner().invoke(app, words)
    code, line = SAID[name]
    said = found.stderr if found.exception is None or isinstance(found.exception, SystemExit) else str(found.exception)
    assert line in said, said
    assert found.exit_code == code or code
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", [name for name, (code, _) in SAID.items() if not code])
def test_a_run_with_fewer_processes_than_the_file_asks_for_is_refused(name: str, tmp_path: Path) -> None:
    sets = [f"distributed.file={FILES / name}.yaml", "model.from=toyworld/clip", "data.from=toyworld/images?n=8"]
    words = ["run", "finetune", "--out", str(tmp_path / "run"), *(w for s in sets for w in ("--set", s))]
    found = CliRunner().invoke(app, words)
    assert found.exit_code and f"{name}.yaml asks for 2 processes but 1 came up" in f"{found.exception}{found.stderr}"
    assert not (tmp_path / "run").exists()
